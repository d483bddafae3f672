"""Score a model, or files of predictions; `--help` of each says more.

`python -m training.score --model ...` scores a model, also with `accelerate launch training/score.py --model ...`;
`python -m training.score files {instance,panoptic,semantic} ...` scores files, as the official tools do.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a file, as `accelerate launch training/score.py` does
    sys.path[0] = str(Path(__file__).resolve().parents[1])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program. Help, mistakes in options, and files do without the libraries of models, which take seconds to import."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["files"]:
        from training import score_files  # noqa: PLC0415

        score_files.main(words[1:])
    else:
        from training.score_options import make_parser  # noqa: PLC0415

        options = make_parser().parse_args(words)
        from training import score_model  # noqa: PLC0415

        score_model.main(options, words)


if __name__ == "__main__":
    main()
