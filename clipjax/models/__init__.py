"""Models: image and text towers. Flax Linen stays inside this folder; outside, parameters are a plain dict."""
