"""Train a model of the package: `python train.py [recipe] [--steps N] [--model.vision.depth 8] …`; see --help.

The loop stands here from top to bottom: build → resume → batch → forward → backward → step → log → evaluate → save.
What a recipe builds on is trained first, if it is missing.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from tqdm import tqdm

from minivlm import curves, memory, processes, trackers, training, training_log
from minivlm.activation_checkpointing import checkpoint_activations
from minivlm.config import to_dict
from minivlm.errors import UserError, run_command_line
from minivlm.losses import backward, scaled
from minivlm.precision import as_stored, hold_for_training
from minivlm.recipes import plan, resuming
from minivlm.recipes.finish import finish, judged_before
from minivlm.recipes.options import Options
from minivlm.recipes.parts import parts_table
from minivlm.recipes.rates import part_rates
from minivlm.recipes.recipe import Recipe
from minivlm.recipes.vision_cache import Room
from minivlm.run import Run, read_record, restore, restore_random
from minivlm.sizes import bytes_in


def main(argv: list[str]) -> None:
    with processes.told_by_first():
        name, recipe, options = plan.command_line(argv)
    if options.help or options.list:
        print(plan.help_text(name, recipe) if options.help else plan.list_text())
    else:
        trackers.require(options.log)
        _, world = processes.start_processes(training.choose_device(options.device))
        with processes.ending_together():
            todo = plan.chain(name, recipe, options)  # what it builds on, where that is missing, then itself
            for part, of, _ in todo:
                processes.check_batch(part, of.batch_size, world)
            first = processes.is_first_process()
            if first:
                plan.check_places(todo)
            if (sentence := plan.announcement(todo)) and first:
                print(sentence)
            for name, recipe, options in todo:
                with Run(options.directory(name), keep=recipe.keep, write=first) as run:
                    if not train(name, recipe, options, run):
                        if first:
                            print(f"Go on with: {plan.go_on(todo, options, argv)}")
                        break
        processes.stop_processes()


def train(name: str, recipe: Recipe, options: Options, run: Run) -> bool:
    """True if all steps are done, False if it was stopped before."""
    # build
    training.keep_freed_memory()
    device = training.choose_device(options.device)
    precision, reason = training.choose_precision(device, options.precision)
    rank, world = processes.start_processes(device)
    say = print if rank == 0 else lambda line: None
    say(f"{name}: {recipe.summary}\n{recipe.steps} steps of {recipe.batch_size} samples on {device}")
    say(f"{str(precision).removeprefix('torch.')}: {reason}")
    resumed = run.latest() if options.resume else None
    if resumed and resuming.is_finished(run, recipe):
        say(f"the run in {run.directory} is finished: all {recipe.steps} steps are done. For more, give --steps.")
        return True
    with processes.rank_zero_first():
        job = recipe.start(resumed, quiet=rank > 0)  # data, processor, model
    model = processes.whole_batch_norm(job.model.to(device).train(), device, world)
    model.check_parts(recipe.batch_size // world, recipe.micro_batch or recipe.batch_size)
    precision, reason = training.suited(precision, model, asked=options.precision)
    if reason:
        say(reason)
    hold_for_training(model, precision)
    rates = part_rates(model, recipe)
    schedule = replace(recipe.optimiser, learning_rate=max(rate for _, rate in rates.values()))  # others follow it
    optimiser = training.make_optimiser(model, schedule, {p: rate for p, (_, rate) in rates.items()})
    torch.manual_seed(recipe.seed + rank)
    for note in job.notes():
        say(note)
    say(parts_table(model, rates, job.origins))

    # resume
    step = restore(resumed, model, optimiser) if resumed else 0
    trained_for = read_record(resumed).get("seconds") if resumed else 0.0  # seconds; None: of an earlier version
    if rank == 0:
        key = (read_record(resumed).get("key") if resumed else None) or trackers.new_key()
        run.about = resuming.facts(name, recipe, device, precision, model) | {
            "chances": dict(job.progress.chances),
            "key": key,
        }
    if resumed:
        report = resuming.report(run, recipe) if rank == 0 else []
        say("\n".join([f"resumed from {resumed}" + restore_random(resumed, device, rank, world), *report]))
    elif rank == 0 and (previous := run.set_aside()):
        say(f"the earlier run was moved to {previous}")
    scaler = training.loss_scaler(device, precision)
    if resumed and scaler.is_enabled():
        scaler.load_state_dict(read_record(resumed).get("loss_scale") or scaler.state_dict())
    by_part = dict(rates.values())
    told = {"recipe": name, **to_dict(recipe)}
    tracked = trackers.Trackers(
        options.log if rank == 0 else "", run.directory, told, first_step=step, key=run.about.get("key", "")
    )
    pace = training_log.Pace(recipe.batch_size, device, trained_for, step)
    how = dict(skips=scaler.is_enabled(), rates=by_part, pace=pace, send=tracked.send)
    log = training_log.Log(run.directory / "log.jsonl", step, write=rank == 0, **how)
    advice = memory.what_to_lower(recipe, options, model, world)
    with memory.explained(advice, run.directory):
        job.prepare(device, precision, Room(bytes_in(options.feature_cache), run.directory, say))
    if rank == 0 and (before := judged_before(job, resumed, device)):
        run.about["before"] = before
    if options.activation_checkpointing:
        checkpoint_activations(model, compiled=options.compile)
    if options.compile:
        training.compile_parts(model)
    processes.meet()  # not all took the same time
    forward = processes.losses_of(model)

    def save() -> None:
        """All processes validate together, the first writes, and the others wait for it."""
        nonlocal saved
        paused, trained = time.perf_counter(), pace.whole()
        try:
            with as_stored(model), processes.together():
                score = job.validate()
        except UserError as error:
            raise UserError(f"after step {step}, learning rate {rate:.2e}: {error}") from None
        processes.meet()  # before a collective, which would time out
        random = processes.random_states(device)  # validation may have drawn from them
        if rank == 0:
            run.about["seconds"] = trained
            run.about |= {"loss_scale": scaler.state_dict()} if scaler.is_enabled() else {}
            log.validated(step, job.scores.name, score)  # first: what is saved has its line
            run.save(step, model, job.processor, optimiser, recipe, score, random)
            curves.write(run.directory, name, job.progress.chances)
            bar.write(f"step {step}: {job.scores.name} {score:.1%} on the validation split, checkpoint saved")
        processes.meet()
        saved = step
        pace.pause(since=paused)  # samples/s speaks of training alone

    # the loop
    stop = min(options.stop_at or recipe.steps, recipe.steps)
    saved = step
    pace.start()
    bar = tqdm(total=recipe.steps, initial=step, disable=rank > 0, bar_format=training_log.BAR_FORMAT)
    ten = memory.FirstSteps(device)
    with tracked, processes.polite_interrupt() as interrupted, memory.explained(advice, run.directory):
        for batch in training.batches(lambda s: job.batch(s, rank, world), step, stop, device):
            with training.autocast(device, precision), scaled(scaler.scale):
                if recipe.micro_batch is None:
                    losses = backward(forward(batch))
                else:
                    losses = model.backward_in_parts(batch, recipe.micro_batch)
                    processes.average_gradients(model)
            rate = training.learning_rate(schedule, step, recipe.steps)
            norm = training.optimise(model, optimiser, rate, schedule.clip_norm, scaler)
            log.add(step, losses, norm, rate)
            step += 1
            bar.update()
            ten.count()
            if step % training_log.log_every(device) == 0 or step == stop or recipe.is_time_to_save(step):
                line = log.flush(job.ids)  # the one place where the device is waited for
                if told := ten.report(recipe.steps, advice):
                    bar.write(told)
                bar.set_postfix_str(f"{job.progress(line)}, {pace.speed(step):.0f} samples/s")
                if interrupted():
                    break
            if recipe.is_time_to_save(step):
                save()
        if step > saved:
            save()
        bar.close()
    if log.skipped:
        say(
            f"{log.skipped} of {step} steps were skipped: their gradients overflowed in float16, and the loss scale fell."
        )
    if step < recipe.steps:
        say(f"stopped after step {step} of {recipe.steps}.")
        return False

    # evaluate, and leave a model behind
    with memory.explained(advice, run.directory):
        finish(run, job)
    processes.meet()
    return True


if __name__ == "__main__":
    run_command_line(main)
