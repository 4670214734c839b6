"""Sentences and questions of the training text. None of them is one of the benchmark of tasks.

In all of them, {e} is what is asked for, {v} its value and {b} an earlier one of a chain.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Lookup:
    """A value of something: sentences that tell it, questions that ask for it, and what names both in a question for several.

    Attributes:
        told: sentences.
        asked: questions.
        several: what is asked for, as a noun phrase in the plural.
        sort: of the value, see `Vocabulary.value`.
    """

    told: tuple[str, ...]
    asked: tuple[str, ...]
    several: str
    sort: str = "number"


@dataclass(frozen=True)
class Chain:
    """A value that something has itself, or has from an earlier one."""

    root: tuple[str, ...]
    link: tuple[str, ...]
    asked: tuple[str, ...]
    sort: str = "number"


LOOKUPS = (
    Lookup(
        (
            "{e} keeps its spare key on hook {v}.",
            "Hook {v} holds the spare key for {e}.",
            "On hook {v} hangs the key for {e}.",
        ),
        ("On which hook is the spare key for {e}?", "Which hook has the key for {e}?"),
        "hooks with keys for {e}",
    ),
    Lookup(
        (
            "Parcels for {e} carry the stamp {v}.",
            "Anything sent to {e} has to be stamped {v}.",
            "For {e}, the stamp to use is {v}.",
        ),
        ("Which stamp do parcels for {e} carry?", "How are parcels for {e} stamped?"),
        "stamps for parcels to {e}",
        "code",
    ),
    Lookup(
        ("{e} was sold for {v} crowns.", "Somebody paid {v} crowns for {e}.", "The price of {e} was {v} crowns."),
        ("How many crowns were paid for {e}?", "For how much was {e} sold?"),
        "prices paid for {e}",
    ),
    Lookup(
        (
            "Visitors to {e} are asked to bring a {v}.",
            "No one enters {e} without a {v}.",
            "At {e} a {v} is handed to every guest.",
        ),
        ("What do visitors to {e} bring or get?", "Which object goes with a visit to {e}?"),
        "objects that go with {e}",
        "item",
    ),
    Lookup(
        (
            "The telephone extension {v} belongs to {e}.",
            "You reach {e} by dialling {v}.",
            "Dial {v} to speak with {e}.",
        ),
        ("What has to be dialled to reach {e}?", "Under which extension is {e} reached?"),
        "extensions of {e}",
    ),
    Lookup(
        ("{e} weighs {v} grams.", "On the scales, {e} shows {v} grams.", "A weight of {v} grams was noted for {e}."),
        ("How many grams does {e} weigh?", "How heavy is {e}?"),
        "weights noted for {e}",
    ),
    Lookup(
        ("The captain of {e} is called {v}.", "{v} commands {e}.", "Since last spring {e} has had {v} for a captain."),
        ("Who commands {e}?", "Who is the captain of {e}?"),
        "captains of {e}",
        "name",
    ),
    Lookup(
        ("Flight {v} goes to {e}.", "Whoever flies to {e} takes flight {v}.", "{e} is served by flight {v}."),
        ("Which flight goes to {e}?", "With which flight does one get to {e}?"),
        "flights to {e}",
        "code",
    ),
    Lookup(
        ("{e} grows {v} trees.", "There are {v} trees on the land of {e}.", "Of all farms, {e} reported {v} trees."),
        ("How many trees are there at {e}?", "What count of trees did {e} report?"),
        "counts of trees at {e}",
    ),
    Lookup(
        ("{e} answers to the call sign {v}.", "On the radio {e} is {v}.", "Call sign {v} was given to {e}."),
        ("What is the call sign of {e}?", "How is {e} called on the radio?"),
        "call signs of {e}",
        "code",
    ),
    Lookup(
        (
            "In the ledger, {e} owes {v} ducats.",
            "A debt of {v} ducats stands against {e}.",
            "{e} still has {v} ducats to pay.",
        ),
        ("How many ducats does {e} owe?", "What is the debt of {e}?"),
        "debts of {e}",
    ),
    Lookup(
        ("The emblem on the flag of {e} is a {v}.", "{e} shows a {v} on its flag.", "A {v} stands for {e}."),
        ("What is on the flag of {e}?", "Which emblem has {e}?"),
        "emblems of {e}",
        "item",
    ),
    Lookup(
        ("remember: {e} = {v}", "setting {e} is {v}", "set {e} to {v};"),
        ("What is {e} set to?", "Which value has {e}?"),
        "values of {e}",
    ),
    Lookup(
        ("| {e} | {v} |", "{e}: {v}", "{e}\t{v}"),
        ("Which entry does the table have for {e}?", "What stands beside {e}?"),
        "entries for {e}",
    ),
)

CHAINS = (
    Chain(
        ("{e} leaves from platform {v}.", "Platform {v} is where {e} leaves."),
        ("{e} leaves from wherever {b} leaves.", "For {e} go to the platform of {b}."),
        ("From which platform does {e} leave?",),
    ),
    Chain(
        ("The lamp in {e} has the code {v}.", "Code {v} switches on the lamp in {e}."),
        ("The lamp in {e} has the code of the lamp in {b}.", "In {e} the lamp takes the code that {b} has."),
        ("Which code has the lamp in {e}?",),
        "code",
    ),
    Chain(
        ("{e} := {v}", "let {e} = {v}", "VAR {e} = {v}"),
        ("{e} := {b}", "let {e} = {b}", "VAR {e} = VAR {b}"),
        ("What is the value of {e}?", "What does {e} hold?"),
    ),
    Chain(
        ("Crate {e} is kept on shelf {v}.", "Shelf {v} has crate {e}."),
        ("Crate {e} is kept right beside crate {b}.", "Look for crate {e} on the shelf of crate {b}."),
        ("On which shelf is crate {e}?",),
    ),
    Chain(
        ("{e} charges a toll of {v}.", "The toll at {e} is {v}."),
        ("{e} charges what {b} charges.", "At {e} the toll equals that at {b}."),
        ("What toll does {e} charge?", "How high is the toll at {e}?"),
    ),
    Chain(
        ("{e} was granted licence {v}.", "Licence {v} was issued to {e}."),
        ("{e} works under the licence of {b}.", "The licence that {b} has covers {e} too."),
        ("Under which licence does {e} work?",),
        "code",
    ),
    Chain(
        ("Recipe {e} asks for {v} grams of salt.", "In recipe {e} there are {v} grams of salt."),
        ("Recipe {e} asks for as much salt as recipe {b}.", "Salt in recipe {e}: see recipe {b}."),
        ("How many grams of salt does recipe {e} ask for?",),
    ),
    Chain(
        ("Calls to {e} arrive at extension {v}.", "{e} picks up at extension {v}."),
        ("Calls to {e} are passed on to {b}.", "{e} has forwarded its telephone to {b}."),
        ("At which extension do calls to {e} arrive in the end?",),
    ),
    Chain(
        ("{e} stands guard with a {v}.", "The guard at {e} holds a {v}."),
        ("{e} copies what the guard at {b} holds.", "At {e} the guard holds the same thing as at {b}."),
        ("What does the guard at {e} hold?",),
        "item",
    ),
    Chain(
        ("{e} is heir to {v} acres.", "{v} acres go to {e}."),
        ("{e} inherits all that {b} had.", "Whatever {b} owned goes to {e}."),
        ("How many acres does {e} get?",),
    ),
)

LABELS = (
    ("Filed under: {v}.", "Under which heading were the most pages filed?"),
    ("This sheet bears the mark of the {v}.", "Which mark do most sheets bear?"),
    ("Sorted into the box with the {v}.", "Into which box was sorted most often?"),
    ("[{v}]", "Which tag occurs most often?"),
)
"""What chunks are labelled with, and how the label of most of them is asked for."""

PREFIXES = (
    "Answer the question using only the passages below.",
    "Answer the question after reading several passages. Answer within 5 words.",
    "Read the passages, then answer.",
    "",
)
