"""`mtp-dist bench head-loss`: memory, time, communication and error of the heads' loss against the number of heads."""
