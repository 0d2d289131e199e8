from mtp_dist.cli import main

main()
