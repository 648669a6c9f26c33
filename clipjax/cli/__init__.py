"""The commands: `clipjax COMMAND`. Only in here are arguments parsed and exit codes known."""
