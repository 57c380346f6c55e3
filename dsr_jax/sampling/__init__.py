"""From a trained denoiser to files of images: labels, sampling functions, resumable jobs."""
