"""Where speed lives: the search and SSIM, each for a CPU and for a GPU."""
