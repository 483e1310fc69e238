"""Makes of your own images, IDX files, text or tables a data set that TFDS reads."""

from research import command
from research.data import prepare

USAGE = (
    "python scripts/prepare_data.py SOURCE --kind {images,idx,lines,files,table} --name NAME "
    "[--field value ...] | --verify DIRECTORY"
)


def main() -> None:
    options = command.parse(prepare.Options, USAGE)
    with command.one_line_errors():
        if options.verify is not None:
            print(
                f"{options.verify}: {prepare.verify(options.verify):,} files as they were written"
            )
        else:
            print(prepare.prepare(options))


if __name__ == "__main__":
    main()
