"""Train the guard: ``python train_guard.py fit --config configs/guard/sft.yaml``."""

from hysafe.app.guard_task import guard_main

if __name__ == "__main__":
    guard_main()
