"""`python -m cachetune_rag` is `cachetune`."""

from cachetune_rag.cli.app import main

if __name__ == "__main__":
    main()
