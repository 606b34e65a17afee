from fundamentallm.cli import main

main()
