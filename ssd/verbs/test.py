"""`ssd test --ckpt_path FILE`: the whole suite of probes, on a run's own held-out data."""

from ssd.errors import UserError
from ssd.verbs import probe
from ssd.verbs.arguments import Parser


def run(argv: list[str]) -> int:
    """As `ssd probe FILE`, under the name and with the option of Lightning's other verbs."""
    parser = Parser(
        prog="ssd test",
        usage="ssd test --ckpt_path FILE [options of ssd probe]",
        description="Judges a checkpoint by every probe on the held-out samples of its own data, or of --data: the command "
        "and the numbers of ssd probe FILE, whose options it takes (ssd probe --help), --baselines, --precision and --json "
        "FILE among them. The few numbers of a run's own evaluations are those of ssd validate.",
    )
    parser.add_argument("--ckpt_path", required=True, metavar="FILE", help="checkpoint that ssd fit wrote")
    arguments, words = parser.parse_known_args(argv)
    for word in words:
        if word.startswith(("--trainer.", "--model.")):
            option = word.partition("=")[0]
            raise UserError(
                f"'{option}' is not a setting of ssd test, which probes frozen features. Use --precision and --device; ssd "
                "probe --help lists all."
            )
    return probe.run([arguments.ckpt_path, *words])
