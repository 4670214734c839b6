"""Runs uv, which installs packages several times as fast as pip, with the settings that pip has on this machine.

    .venv/bin/python tools/run_uv.py pip install --python .venv/bin/python --editable .

uv reads none of pip's files and variables, so a machine whose pip is told of a mirror, of a folder with wheels or of
a certificate would be asked to name them twice. A variable that uv reads itself (`UV_DEFAULT_INDEX`, ...) has the last word.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Mapping

# Of pip's settings those that say where packages come from and how that place is reached: the variables in which uv takes
# the same, and what stands between the values of a list.
VARIABLES = {
    "index-url": (("UV_DEFAULT_INDEX",), " "),
    "extra-index-url": (("UV_INDEX",), " "),
    "no-index": (("UV_NO_INDEX",), " "),
    "find-links": (("UV_FIND_LINKS",), ","),
    "trusted-host": (("UV_INSECURE_HOST",), " "),
    "cert": (("SSL_CERT_FILE",), " "),
    "client-cert": (("SSL_CLIENT_CERT",), " "),
    "proxy": (("HTTP_PROXY", "HTTPS_PROXY"), " "),
    "timeout": (("UV_HTTP_TIMEOUT",), " "),
    "default-timeout": (("UV_HTTP_TIMEOUT",), " "),
}

# Python is the one that was asked for, never one that uv fetches. Files are copied as pip does it: nltk, which LlamaIndex splits texts with,
# refuses to open files with several hard links.
OWN = {"UV_PYTHON_DOWNLOADS": "never", "UV_LINK_MODE": "copy"}

# Where pip keeps a setting; the later ones win.
SECTIONS = ("global", "install", ":env:")


def settings(listed: str) -> dict[str, str]:
    """The variables for uv, from what `pip config list` prints: lines such as `global.timeout='60'`."""
    found: dict[str, dict[str, str]] = {section: {} for section in SECTIONS}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        section, _, key = name.rpartition(".")
        if section in found and key in VARIABLES:
            found[section][key] = str(ast.literal_eval(value))
    made = {}
    for section in SECTIONS:
        for key, value in found[section].items():
            variables, between = VARIABLES[key]
            made.update(dict.fromkeys(variables, between.join(value.split())))
    if "UV_INDEX" in made:
        # As pip does: the best version of all indexes, not that of the first which has the package.
        made["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return made


def environment(listed: str, given: Mapping[str, str]) -> dict[str, str]:
    """The variables that uv is started with."""
    return {**OWN, **settings(listed), **given}


def main() -> None:
    """Ends as uv ends."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    os.execve(sys.executable, [sys.executable, "-m", "uv", *sys.argv[1:]], environment(listed, os.environ))


if __name__ == "__main__":
    main()
