"""python -m hf_recontrol"""

from .cli import main

main()
