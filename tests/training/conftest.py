"""Eight simulated devices, unless somebody has set their number already."""

import jax

jax.config.update("jax_platforms", "cpu")
if jax.config.jax_num_cpu_devices < 1:
    jax.config.update("jax_num_cpu_devices", 8)
