from streamcomp.cli import main

main()
