"""The GPT of `gpt.py` on several islands: jobs of their own that exchange what they learn.

    outlast launch --islands 2 examples/gpt_islands.py --every 30 --layers 6 --width 128

All flags of `gpt.py` hold for each island, `--leaves` too: two islands of 2 leaves take together
the samples that one job of 4 takes. What is validated, and written by `--weights`, is the outer
copy, which all islands share.
"""

import argparse
import json
import math
import os
from collections.abc import Sequence

import gpt
import torch
from corpus import Windows, standard_library
from progress import Progress

import outlast
from outlast import Islands


def parse(arguments: Sequence[str] | None = None) -> tuple[Islands, argparse.Namespace]:
    """What the islands exchange, and the flags of each."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog="and all flags of gpt.py"
    )
    add, usual = parser.add_argument, Islands()
    add("--every", type=int, default=usual.every, help="H, steps between exchanges of a fragment")
    add("--fragment", type=int, default=usual.fragment, help="units of one fragment")
    add("--order", choices=Islands.ORDERS, default=usual.order)
    add("--delay", type=int, default=usual.delay, help="tau, steps that an exchange may take")
    add("--mixing", type=float, default=usual.mixing, help="alpha, share of the local parameters")
    add("--outer-lr", type=float, default=usual.outer_lr)
    add("--outer-momentum", type=float, default=usual.outer_momentum)
    add("--codec", choices=Islands.CODECS, default=usual.codec)
    add("--rule", choices=Islands.RULES, default=usual.rule)
    add("--patience-s", type=float, default=usual.patience_s, help="for an island that is late")
    add("--record", default="", help="keep there all that is averaged")
    add("--replay", default="", help="train one island once more on what it has received")
    chosen, rest = parser.parse_known_args(arguments)
    return Islands(**vars(chosen)), gpt.parse(rest)


def train(islands: Islands, args: argparse.Namespace) -> None:
    """Train as the flags say, and tell about it on rank 0."""
    run = outlast.init(seed=args.seed, leaves=args.leaves, islands=islands)
    corpus = standard_library(args.corpus_mb)
    training, validation = (Windows(t, args.context) for t in (corpus.train, corpus.validation))
    model, parameters = gpt.prepare(run, args)
    metrics: dict[str, float] = {}
    island = os.environ.get("OUTLAST_ISLAND", "0")
    with Progress(args.steps, f"island {island}  ") as progress:
        for step in run.steps(args.steps):
            with step:
                for batch in step.batches(training, batch_size=args.batch_size):
                    step.backward(gpt.loss_fn(model, batch))
            done = step.index + 1
            metrics = {"loss": step.loss, "bits_per_byte": step.loss / math.log(2)}
            if args.eval_every and (done == args.steps or done % args.eval_every == 0):
                with run.outer():
                    bits = gpt.validate(model, validation, args.eval_batches, args.batch_size)
                metrics["validation_bits_per_byte"] = bits
            run.log(**metrics)
            if run.rank == 0:
                progress.show(done, run.world_size, metrics)
    with run.outer():
        weights = {name: value.clone() for name, value in model.state_dict().items()}
    digest, outer = run.digest(), run.digest("outer_param", "outer_momentum")
    if run.rank == 0:
        print(f"sha256 of parameters and optimizer state: {digest}")
        print(f"island {island}, of the outer state: {outer}")
        if args.digest_file is not None:
            result = {"sha256": digest, "parameters": parameters, **metrics}
            gpt.write(args.digest_file, json.dumps(result) + "\n")
        if args.weights is not None:
            torch.save(weights, args.weights)
    run.close()


if __name__ == "__main__":
    train(*parse())
