"""What a run would need and take on a pod, known beforehand."""
