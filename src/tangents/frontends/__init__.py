"""The only rooms that may import a framework: one file each, found through `sys.modules`."""
