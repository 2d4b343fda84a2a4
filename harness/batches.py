"""Images in memory or in files -> batches on the device, in an order that depends on seed and epoch alone."""
import copy
from itertools import islice

import numpy as np
import torch

from harness.errors import UserError
from harness.images import ImageFiles, stack

SHARE = 0.25  # of a GPU's memory


def send(tensor, device):
    """A tensor of the CPU on a device, without a wait for it."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def has_room(device, tensor):
    """Whether a tensor may stay on a device for good: on a GPU, where it takes at most `SHARE` of the memory."""
    return device.type != "cuda" or tensor.nbytes <= SHARE * torch.cuda.get_device_properties(device).total_memory


class Batches:
    """Batches x (B, C, H, W) float32 in [-1, 1], channels_last on `device`, and labels (B,) int64.

    Images are a (N, H, W, C) uint8 tensor, which moves to the device as a whole where it `has_room`, or `ImageFiles`,
    which stream. Of images larger than `size` (H, W) each epoch sees a random part of that size.
    Order, flips and parts of an epoch depend on the seed and the epoch alone, so that a run can go on anywhere.
    Of many processes, each yields its share of batches `world` times as large; `batch_size` is that of all together.

    Raises:
        ValueError: images in memory are not 8-bit (N, H, W, C), the one kind whose range is certain.
    """

    rank, world = 0, 1

    def __init__(self, images, labels, batch_size, device="cpu", shuffle=False, flip=False, seed=0, workers=0,
                 size=None):
        self.streams = isinstance(images, ImageFiles)
        whole = images.size if self.streams else self._check(images)
        self.size, self.room = size or whole, [old - new for old, new in zip(whole, size or whole)]
        self.batch_size, self.device, self.workers = batch_size, torch.device(device), workers
        place = "cpu" if self.streams or not has_room(self.device, images) else self.device
        self.images, self.labels = images if self.streams else images.to(place), labels.to(place)
        self.shuffle, self.flip, self.seed = shuffle, flip, seed
        self.skipped, self._ahead = 0, None

    @staticmethod
    def _check(images):
        """Sides of images in memory."""
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(f"images must be (N, H, W, C) uint8, got {tuple(images.shape)} {images.dtype}")
        return tuple(images.shape[1:3])

    def shard(self, rank, world, split="training or evaluation"):
        """Yield the share of process `rank` of `world` alone: whoever goes through all shares sees each image once.

        Raises:
            UserError: there are fewer images than processes.
        """
        if len(self.labels) < world:
            raise UserError(f"{len(self.labels)} {split} images are fewer than the {world} processes: start fewer "
                            "processes, or add images")
        self.rank, self.world = rank, world
        self.batch_size *= world

    def in_order(self):
        """The same batches of every image once, in the order of the split."""
        other = copy.copy(self)
        other.shuffle, other._ahead = False, None
        return other

    def sizes(self):
        """Number of images in each batch, all processes together; too few for each to have one join those before."""
        whole, rest = divmod(len(self.labels), self.batch_size)
        if self.shuffle and whole:  # training drops the ragged tail of an epoch: all its batches weigh the same
            return [self.batch_size] * whole
        if whole and rest and rest < self.world:
            return [self.batch_size] * (whole - 1) + [self.batch_size + rest]
        return [self.batch_size] * whole + [rest] * bool(rest)

    def __len__(self):
        return len(self.sizes())

    def __iter__(self):
        return self.epoch(0)

    def epoch(self, epoch, start=0):
        """The batches of an epoch from batch number `start` on."""
        plan, read = self._plan(epoch)[start:], self._stream if self.streams else self._pick
        for (images, labels), (_, flip, corner) in zip(read(plan, epoch, start), plan):
            if labels is None:
                continue
            x = self._to_input(images if corner is None else self._parts(images, corner[:len(images)]))
            if flip is not None:
                flip = flip[:len(x)].view(-1, 1, 1, 1)
                x = torch.where(flip, x.flip(3), x).contiguous(memory_format=torch.channels_last)
            yield x, labels

    def examples(self, count):
        """Batch of at most `count` images spread evenly over the split, unflipped, of their middle."""
        index = torch.linspace(0, len(self.labels) - 1, min(count, len(self.labels))).long()
        images = stack([self.images[i] for i in index])[0] if self.streams else self.images[index]
        images = images.to(self.device)
        middle = torch.tensor([[room // 2 for room in self.room]]).expand(len(images), 2)
        return self._to_input(self._parts(images, middle) if any(self.room) else images)

    def _plan(self, epoch):
        """[(indices, flips or None, upper left corners or None)] of this process's batches of an epoch."""
        word = np.random.SeedSequence((self.seed, epoch)).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(word >> np.uint64(1)))
        count, sizes = len(self.labels), self.sizes()
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        flips = torch.rand(count, generator=generator) < 0.5 if self.flip else None
        corners = torch.stack([torch.randint(room + 1, (count,), generator=generator) for room in self.room], 1) \
            if any(self.room) else None
        # To the device as a whole, so that no batch waits for its part; the order to where images are looked up.
        columns = order.to(self.labels.device), *(
            column if column is None else column.to(self.device) for column in (flips, corners))
        columns = ([part.tensor_split(self.world)[self.rank] for part in column[:sum(sizes)].split(sizes)]
                   if column is not None else [None] * len(sizes) for column in columns)
        return list(zip(*columns))

    def _parts(self, images, corners):
        """Of each image (B, H, W, C) the part of `size` whose upper left corner (B, 2) is given."""
        rows, columns = (corner.to(images.device)[:, None] + torch.arange(side, device=images.device)
                         for corner, side in zip(corners.unbind(1), self.size))
        index = torch.arange(len(images), device=images.device)
        return images[index[:, None, None], rows[:, :, None], columns[:, None, :]]

    def _to_input(self, images):
        return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)

    def _pick(self, plan, epoch, start):
        for batch, *_ in plan:
            yield self._sent(self.images.index_select(0, batch), self.labels[batch])

    def _sent(self, images, labels):
        return send(images, self.device), send(labels, self.device)

    def _stream(self, plan, epoch, start):
        """Decoded batches. Where epochs follow one another, the workers go on into the next while others compute."""
        if not self._ahead or self._ahead[0] != (epoch, start):
            self._ahead = None, self.images.batches(self.workers, batch_sampler=self._endless(epoch, start),
                                                    pin_memory=self.device.type == "cuda")
        decoded, self._ahead, skipped = self._ahead[1], None, 0
        for batch, *_ in plan:
            images, kept = next(decoded)
            skipped += len(batch) - len(kept)
            if not len(kept) and self.shuffle:  # training counts its batches
                images, batch, kept = self._others(batch)
            yield self._sent(images, self.labels[batch[kept]]) if len(kept) else (None, None)
        if self.shuffle:
            self._ahead = (epoch + 1, 0), decoded
        elif skipped == sum(len(batch) for batch, *_ in plan) > 0:
            raise self._none_decodes(skipped, plan[0][0][0])
        if skipped > self.skipped:  # once, not every epoch
            print(f"skipped {skipped} broken images of {len(self.labels)}")
            self.skipped = skipped

    def _others(self, batch):
        """In place of a batch whose images are all broken: as many after its first that are not, numbers and places."""
        count, first = len(self.labels), int(batch[0])
        walk = ((number % count, self.images[number % count]) for number in range(first, first + count))
        whole = list(islice(((number, image) for number, image in walk if image is not None), len(batch)))
        if not whole:
            raise self._none_decodes(count, first)
        numbers, images = zip(*whole)
        return stack(images)[0], torch.tensor(numbers), torch.arange(len(numbers))

    def _none_decodes(self, count, number):
        return UserError(f"none of {count} images decodes, such as {self.images.paths[number]}: repair or remove them")

    def _endless(self, epoch, start):
        """Lists of indices: the batches of an epoch and, in training, of those after it."""
        while True:
            yield from (batch.tolist() for batch, *_ in self._plan(epoch)[start:])
            if not self.shuffle:
                return
            epoch, start = epoch + 1, 0
