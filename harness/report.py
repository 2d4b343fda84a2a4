"""What a person looks at: tables in the terminal and pictures of images side by side."""
import torch

LEAST_SIDE = 96  # pixels; smaller images are enlarged by a whole factor, each pixel a square


def markdown_table(header, rows):
    """Aligned Markdown table; numbers with four significant digits."""
    cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def image_rows(rows, least_side=LEAST_SIDE):
    """One picture (3, H', W') in [0, 1] of rows of images, each row (N, C, H, W) in [0, 1]; the last may be shorter."""
    from torchvision.utils import make_grid  # here, because it takes more than a second to import
    images = torch.cat([row.float().cpu() for row in rows])
    factor = -(-least_side // min(images.shape[2:]))
    images = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return make_grid(images, nrow=len(rows[0]), padding=4, pad_value=1.)


def save_picture(path, rows, least_side=LEAST_SIDE):
    """Save rows of images (N, C, H, W) in [0, 1] as a PNG; images smaller than `least_side` are enlarged."""
    from torchvision.utils import save_image
    save_image(image_rows(rows, least_side), path)
    return path
