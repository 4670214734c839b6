"""`python -m cachetune_rag` is `cachetune`."""

from cachetune_rag.cli import main

if __name__ == "__main__":
    main()
