"""Does a prior draw the class it is asked for? A small classifier, trained on the real images, is the judge."""
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import datasets
from harness import checkpoint, cli, report
from latents import check_vqvae
from modules import GatedPixelCNN, VectorQuantizedVAE


def classifier(channels, n_classes):
    """A convolutional network for small images: (B, C, H, W) in [-1, 1] -> logits (B, n_classes)."""
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(512, n_classes))


def accuracy(model, batches):
    """Share of images (N, C, H, W) with labels (N,) that the model classifies so."""
    model.eval()
    with torch.no_grad():
        right = [(model(x).argmax(1) == label).float() for x, label in batches]
    return float(torch.cat(right).mean())


def main():
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--model", required=True, metavar="PT", help="checkpoint of vqvae.py, or its run's folder")
    parser.add_argument("--prior", required=True, metavar="PT",
                        help="checkpoint of pixelcnn_prior.py, or its run's folder")
    parser.add_argument("--data-folder", help="(default the VQ-VAE's)")
    parser.add_argument("--epochs", type=cli.positive_int, default=2, help="of the judge (default %(default)s)")
    parser.add_argument("--samples", type=cli.positive_int, default=100, help="a class (default %(default)s)")
    parser.add_argument("--temperature", type=cli.positive, default=1., help="(default %(default)s)")
    parser.add_argument("--top-k", type=cli.positive_int, help="draw from the most probable codes only")
    parser.add_argument("--seed", type=cli.seed, default=0, help="(default %(default)s)")
    parser.add_argument("--device", default="auto", help="(default %(default)s)")
    args = parser.parse_args()

    device = cli.pick_device(args.device)
    found, prior_found = checkpoint.load(args.model, "vqvae"), checkpoint.load(args.prior, "prior")
    classes = found["data"]["classes"]
    if not classes:
        raise ValueError(f"{args.model} was trained on a data set without classes: there is nothing to agree on")
    check_vqvae(prior_found, args.model)
    data = datasets.load(found["data"]["name"], datasets.Source.of(found, args.data_folder), 128, device)

    torch.manual_seed(args.seed)
    judge = classifier(data.channels, len(classes)).to(device)
    optimizer = torch.optim.Adam(judge.parameters(), lr=1e-3)
    for epoch in range(args.epochs):
        judge.train()
        for x, label in data.train.epoch(epoch):
            loss = F.cross_entropy(judge(x), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    vqvae, prior = VectorQuantizedVAE.rebuild(found).to(device), GatedPixelCNN.rebuild(prior_found).to(device)
    shape, samples = tuple(side // vqvae.downsample for side in data.size), []
    generator = torch.Generator().manual_seed(args.seed)
    for index in range(len(classes)):
        label = torch.full((args.samples,), index, device=device)
        latents = prior.generate(label, shape, args.samples, args.temperature, args.top_k, generator)
        with torch.no_grad():
            samples.append((vqvae.decode(latents), label))
    with torch.no_grad():
        rebuilt = [(vqvae(x)[0], label) for x, label in data.test]
    rows = [["real test images", accuracy(judge, data.test)], ["their reconstructions", accuracy(judge, rebuilt)],
            [f"samples, {args.samples} a class", accuracy(judge, samples)]]
    rows += [[f"  {name}", accuracy(judge, [part])] for name, part in zip(classes, samples)]
    print(report.markdown_table([f"judged by {Path(__file__).stem}", "agreement"], rows))


if __name__ == "__main__":
    cli.run(main)
