from minivlm.errors import run_command_line
from minivlm.human.command import main

run_command_line(main)
