"""Documents from files and folders."""
