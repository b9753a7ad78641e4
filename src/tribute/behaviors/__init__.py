"""Model behaviors: numbers that describe the images a model generates, from one shared feature pass."""
