"""The command line: options, messages, and the commands that are not stages.

The last package: nothing imports it, stages included. It imports a stage inside the command's body, so that
`pipeline --help` does not load torch.
"""
