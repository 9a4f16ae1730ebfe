"""A study on a SLURM cluster: N workers, one shared folder, no coordinator.

    pip install . submitit                    # in a clone of pyprune
    python examples/slurm/study_workers.py MODEL /shared/study --workers 8 --partition gpu

Each worker is one call of ``pyprune.study`` on the same folder: it takes the runs that nobody works on. A worker that
is killed or preempted leaves a claim that goes stale, and another one takes its run over. Start the script again to add
workers, or with more values to extend the study; what is finished stays.
"""

from __future__ import annotations

import argparse

import pyprune


def work(model: str, folder: str) -> dict:
    """One worker. The grid must be the same in all of them."""
    return pyprune.study(
        model,
        folder,
        methods=["wanda", "sparsegpt"],
        patterns=["unstructured", "2:4"],
        sparsities=[0.3, 0.4, 0.5, 0.6],
        reconstruct=[None, "refit"],
        seeds=3,
        calibration=pyprune.Calibration(source="allenai/c4", subset="en", num_samples=128, seq_len=2048),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("folder", help="on a file system that all nodes share")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--partition", default="gpu")
    parser.add_argument("--hours", type=float, default=12)
    args = parser.parse_args()

    import submitit

    executor = submitit.AutoExecutor(folder=f"{args.folder}/logs")
    executor.update_parameters(
        slurm_partition=args.partition,
        timeout_min=int(60 * args.hours),
        gpus_per_node=1,
        cpus_per_task=8,
        mem_gb=64,
        name="pyprune-study",
    )
    with executor.batch():
        jobs = [executor.submit(work, args.model, args.folder) for _ in range(args.workers)]
    print(f"{len(jobs)} workers: {', '.join(job.job_id for job in jobs)}")
    print(f"the table grows in {args.folder}/table.md, the page in {args.folder}/study.html")


if __name__ == "__main__":
    main()
