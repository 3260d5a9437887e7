from minivlm.bench import main
from minivlm.errors import run_command_line

if __name__ == "__main__":  # the contestants' processes import this file as well
    run_command_line(main)
