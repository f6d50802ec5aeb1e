"""What POET-X is compared with, one file each; `methods.build` makes them ready."""
