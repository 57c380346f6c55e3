"""Register neurons and test-time registers: finding them, planting them, applying them."""
