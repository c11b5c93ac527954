"""`python -m d2surgery …`, and with it `torchrun -m d2surgery train …` and `accelerate launch -m d2surgery train …`."""

from d2surgery.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
