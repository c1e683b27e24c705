import sys


def main() -> int:
    """The command; its packages come with the extra `train`, and the losses do without them."""
    try:
        from autoregembed import cli
    except ModuleNotFoundError as error:
        print(f"autoregembed: {error}; the command needs the extra 'train'", file=sys.stderr)
        return 2
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
