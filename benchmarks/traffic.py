"""What a training step sends: predicted by formula, and counted in two processes.

    python -m benchmarks.traffic            # counts on tiny models beside the prediction
    python -m benchmarks.traffic --table    # docs/scale.md's table, for the sizes of the paper

`Exchange` counts what a rank hands to torch.distributed's functions. What goes over the wire is that times (n - 1) for
all_gather, 2 (n - 1) / n for all_reduce (ring), and what is for other ranks for all_to_all.
"""

import argparse

from tests.helpers.traffic import count_in_two_processes, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", action="store_true", help="print docs/scale.md's table")
    if parser.parse_args().table:
        print(table())
        return
    for stage in (1, 2):
        for rank, result in enumerate(count_in_two_processes(stage)):
            print(f"stage {stage}, rank {rank} of 2, 4 pairs{'':<18}{'predicted':>12}{'counted':>12}   bytes")
            for purpose in sorted(result["predicted"].keys() | result["counted"].keys()):
                predicted, counted = (result[kind].get(purpose, 0) for kind in ("predicted", "counted"))
                print(f"  {purpose:<38}{predicted:>12,}{counted:>12,}")


if __name__ == "__main__":
    main()
