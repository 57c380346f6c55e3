"""PyTorch state dicts to Flax parameter trees and back, strictly and without loss."""
