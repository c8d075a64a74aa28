"""Where the time of our stage-1 step goes: torch.profiler's operations by their own time, forward and backward.

python -m benchmarks.profile_step [--device cuda] [--bf16] [--batch 8]
"""

import argparse

from torch.profiler import ProfilerActivity, profile

from benchmarks.stage1_step import build_model, make_batch, our_losses, step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    model, batch = build_model(args.device).train(), make_batch(args.device, args.batch)
    dtype = "bfloat16" if args.bf16 else "float32"
    step(model, our_losses, batch, dtype)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (args.device == "cuda")
    with profile(activities=activities) as profiled:
        step(model, our_losses, batch, dtype)
    print(
        profiled.key_averages().table(sort_by=f"self_{args.device}_time_total", row_limit=20, max_name_column_width=50)
    )


if __name__ == "__main__":
    main()
