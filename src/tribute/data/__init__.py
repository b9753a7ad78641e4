"""Training images, their contributors, and the tensor they are gathered from."""
