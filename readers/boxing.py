"""Frames of Atari Boxing, in order, with the actions that led to them: rendered once, kept in one file."""
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from harness.checkpoint import write_with
from harness.errors import UserError
from harness.progress import Progress

FRAMES = {"train": 80000, "valid": 2000, "test": 2000}
SIZE, SKIP = 84, 2  # pixels a side; emulator frames, 60 a second, from one that is kept to the next
HELD = (6, 80)  # least and most kept frames of a random action, log-uniform: one sees what it does, up to the ropes
VERSION = 5  # of what the cache holds: a file of another is rendered anew
ACTIONS = ["noop", "fire", "up", "right", "left", "down", "upright", "upleft", "downright", "downleft", "upfire",
           "rightfire", "leftfire", "downfire", "uprightfire", "upleftfire", "downrightfire", "downleftfire"]
MARK = f"boxing-{SIZE}.npz"


def load(folder, limit=None):
    """{split: (frames (N, 84, 84, 3) uint8, (N, 3) int64: episode, number within it, action that led to it)}.

    An action is an index into `ACTIONS`, 0 for the first frame of an episode. Each split plays episodes of its own.
    With a limit and no cache, so many frames of each split are rendered, the first ones, and not kept.

    Raises:
        UserError: the cache is damaged, or ale-py is needed and missing.
    """
    cache = Path(folder) / MARK
    kept = _read(cache) if cache.is_file() else None
    if kept is None:
        kept = {"version": np.array(VERSION)}
        for seed, (split, count) in enumerate(FRAMES.items()):
            kept[split], kept[f"{split}-clips"] = render(min(count, limit or count), seed, split)
        if not limit:
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_with(cache, lambda file: np.savez_compressed(file, **kept))
            kept = _read(cache) or kept  # of many processes, one writes
    return {split: (torch.from_numpy(kept[split]), torch.from_numpy(kept[f"{split}-clips"])) for split in FRAMES}


def _read(cache):
    """Arrays of the cache by name; None where it is of another version."""
    try:
        with np.load(cache) as arrays:
            if "version" not in arrays or arrays["version"] != VERSION:
                return None
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:
        raise UserError(f"{cache} is damaged ({error}): delete it, and it is rendered anew") from error


def render(count, seed, split):
    """Play `count` frames of a split under a random policy; frames and what led to them, as in `load`.

    Raises:
        UserError: ale-py is missing.
    """
    try:
        from ale_py import ALEInterface, LoggerMode, roms
    except ImportError as error:
        raise UserError("the boxing data set needs the package ale-py: pip install ale-py") from error
    ALEInterface.setLoggerMode(LoggerMode.Error)
    ale, policy, frames, clips = ALEInterface(), np.random.default_rng(seed), [], []
    ale.setInt("random_seed", seed)
    ale.setFloat("repeat_action_probability", 0.)  # an action is the one recorded
    ale.loadROM(roms.get_rom_path("boxing"))
    episode = number = action = held = 0
    progress = Progress(f"rendering {split}", count, "frames")
    while True:
        frame = Image.fromarray(ale.getScreenRGB()).resize((SIZE, SIZE), Image.Resampling.BOX)
        frames.append(np.asarray(frame))
        clips.append((episode, number, action))
        progress.add(1)
        if len(frames) == count:
            progress.close()
            return np.stack(frames), np.array(clips, dtype=np.int64)
        if not held:
            action = int(policy.integers(len(ACTIONS)))
            held = int(HELD[0] * ((HELD[1] + 1) / HELD[0]) ** policy.random())
        for _ in range(SKIP):
            ale.act(ale.getLegalActionSet()[action])
        number, held = number + 1, held - 1
        if ale.game_over():
            ale.reset_game()
            episode, number, action, held = episode + 1, 0, 0, 0


def open_boxing(source):
    """{split: (frames, labels, which are all 0, or rows of frames in order)} of a `datasets.Source`; no classes."""
    splits = {}
    for split, (frames, clips) in load(source.folder, source.limit).items():
        label = torch.zeros(len(frames), 1, dtype=torch.int64)
        splits[split] = (frames, torch.cat([label, clips], 1) if source.in_order else label[:, 0])
    return splits, []


open_boxing.actions, open_boxing.version, open_boxing.mark = ACTIONS, VERSION, MARK
open_boxing.is_in = lambda root: (root / MARK).exists()
