"""The command line. A command imports what it runs inside its body, so `pipeline --help` needs no torch."""
