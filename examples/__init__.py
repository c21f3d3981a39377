"""Scripts to read and to change; a package only so that studies can import one by its whole name."""
