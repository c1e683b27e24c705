"""The subcommands, for the command itself and for where its packages are not installed."""

COMMANDS = {
    "train": "train CONFIG.yaml [--field value ...]",
    "plan": "compute how much memory CONFIG.yaml will need",
    "encode": "embed the lines of a text file",
    "eval": "score a model by STS and retrieval",
    "export": "write a folder for sentence-transformers, optionally centred",
    "probe": "show what a stage-1 model has learned",
    "bench": "time the ops and the training step",
    "init": "copy a ready configuration",
    "completion": "print a completion script for bash, zsh, fish or tcsh",
    "doctor": "show what is installed and which backends run here",
}
HEAVY = COMMANDS.keys() - {"init", "completion", "doctor"}  # read a model
