"""Does a prior draw the class it is asked for, and how far from real images? A classifier trained on these judges."""
import torch

import datasets
from harness import checkpoint, cli, report
from harness.errors import UserError
from metrics import as_8bit
from modules import GatedPixelCNN, VectorQuantizedVAE
from priors.first_stage import add_drawing_arguments, check_classes, check_vqvae
from study.distances import frechet_distance
from study.judges import Judge, open_judged, open_network


def main():
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--model", type=cli.path, required=True, metavar="PT",
                        help="checkpoint of vqvae.py, or its run's folder")
    parser.add_argument("--prior", type=cli.path, required=True, metavar="PT",
                        help="checkpoint of pixelcnn_prior.py, or its run's folder")
    parser.add_argument("--data-folder", type=cli.path, help="(default the VQ-VAE's)")
    parser.add_argument("--samples", type=cli.positive_int, default=100, help="a class (default %(default)s)")
    add_drawing_arguments(parser)
    parser.add_argument("--seed", type=cli.whole, default=0, help="(default %(default)s)")
    parser.add_argument("--device", default="auto", help="(default %(default)s)")
    args = parser.parse_args()

    device = cli.pick_device(args.device)
    ckpt, prior_ckpt = checkpoint.load(args.model, "vqvae", datasets.FACTS), checkpoint.load(args.prior, "prior")
    classes = ckpt["data"]["classes"]
    if not classes:
        raise UserError(f"{args.model} was trained on a data set without classes: there is nothing to agree on")
    check_vqvae(prior_ckpt, args.model)
    source = datasets.Source.of(ckpt, args.data_folder)
    data, _ = open_judged(ckpt["data"]["name"], source, {args.model: ckpt}, (), device)
    check_classes(data, classes, source.folder)  # before a classifier learns others
    judge = Judge("classifier", open_network("classifier", data, source), data.test)

    vqvae, prior = VectorQuantizedVAE.rebuild(ckpt).to(device), GatedPixelCNN.rebuild(prior_ckpt).to(device)
    shape, generator = tuple(side // vqvae.downsample for side in data.size), torch.Generator().manual_seed(args.seed)
    labels = torch.arange(len(classes), device=device).repeat_interleave(args.samples)
    with torch.no_grad():
        drawn = [vqvae.decode(prior.generate(label, shape, len(label), args.temperature, args.top_k, generator))
                 for label in labels.split(args.samples)]
        samples = torch.cat([judge.network(as_8bit(x)) for x in drawn])
        rebuilt = torch.cat([judge.network(as_8bit(vqvae(x)[0])) for x, _ in data.test])
    rows = [["real test images", judge.agreement(judge.real, judge.labels), ""]]
    for name, features, of in (("their reconstructions", rebuilt, judge.labels),
                               (f"samples, {args.samples} a class", samples, labels)):
        rows.append([name, judge.agreement(features, of), frechet_distance(features, judge.real)])
    rows += [[f"  {name}", judge.agreement(*part), ""]
             for name, *part in zip(classes, samples.split(args.samples), labels.split(args.samples))]
    print(report.markdown_table(["judged by the classifier", "agreement", "Fréchet distance"], rows))


if __name__ == "__main__":
    cli.run(main, many=False)
