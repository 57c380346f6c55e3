"""Sampling from a trained denoiser to image files: labels, samplers, resumable jobs."""
