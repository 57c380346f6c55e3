"""Pictures and self-contained HTML pages: one template, and what fills it."""
