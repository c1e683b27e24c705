"""The command before its packages: `--version`, `--help` and `doctor` run with torch alone."""

import os
import sys

from autoregembed.commands import COMMANDS, HEAVY


def _needs_more(error: ModuleNotFoundError) -> str:
    from autoregembed.doctor import install_line

    line = install_line()
    return f"needs packages that are not installed ({error}):\n  {line}" if line else f"fails: {error}"


def main() -> int:
    """The `autoregembed` command; returns the exit status."""
    arguments = sys.argv[1:]
    if arguments == ["--version"]:
        from autoregembed import __version__

        print(f"autoregembed {__version__}")
        return 0
    if arguments == ["doctor"]:
        from autoregembed.doctor import report

        print(report())
        return 0
    working = not HEAVY.isdisjoint(arguments[:1]) and not {"-h", "--help"} & {*arguments}
    if working:
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported; the bar here is the command's own
    if working and os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"autoregembed {arguments[0]}: loading libraries", file=sys.stderr, flush=True)
    try:
        from autoregembed import cli

        return cli.main(arguments)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "autoregembed":
            raise
        if arguments in ([], ["-h"], ["--help"]):
            print("usage: autoregembed COMMAND ...\n")
            print("\n".join(f"  {name:<10}  {text}" for name, text in COMMANDS.items()))
            print(f"\nOnly doctor and --version run here. Every other command {_needs_more(error)}")
            return 0 if arguments else 2
        print(f"autoregembed {' '.join(arguments[:1])}: {_needs_more(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
