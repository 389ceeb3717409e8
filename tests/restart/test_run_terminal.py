"""``autobatch run`` on a terminal: the script has the terminal, Ctrl-C and Ctrl-Z do what they do without us."""

import contextlib
import os
import pty
import select
import signal
import time

from running import command, environment, script, starts


class Terminal:
    """A session with a terminal of its own, in which the command runs as the foreground job."""

    def __init__(self, path, **changes):
        self.shown = b""
        self.pid, self.ours = pty.fork()
        if not self.pid:
            arguments = command(path)
            os.execve(arguments[0], arguments, environment(**changes))

    def until(self, text, seconds=30):
        """Read until the text was shown; return False if the terminal was closed before."""
        patience = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < patience, self.shown
            if select.select([self.ours], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self.ours, 4096)
                except OSError:  # how Linux says that the other side has closed
                    return False
        return True

    def type(self, keys):
        os.write(self.ours, keys)

    def end(self):
        """Read the rest; return the exit code, negative for a signal."""
        with contextlib.suppress(AssertionError):
            self.until(b"there is no such text", seconds=20)
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.ours)
        return code


def test_the_script_has_the_terminal(tmp_path):
    path = script(
        tmp_path,
        """
        print([os.isatty(number) for number in range(3)])
        print(os.getpgrp() == os.tcgetpgrp(0), input("name? "))
        """,
    )
    terminal = Terminal(path)
    terminal.until(b"name? ")
    terminal.type(b"mine\n")
    assert terminal.end() == 0
    assert b"[True, True, True]" in terminal.shown
    assert b"True mine" in terminal.shown


def test_ctrl_c_reaches_the_script_once_and_ends_both(tmp_path):
    path = script(
        tmp_path,
        """
        try:
            print("ready", flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            time.sleep(0.5)  # a second one would come here
            print("interrupted once", flush=True)
            raise
        """,
    )
    terminal = Terminal(path)
    terminal.until(b"ready")
    terminal.type(b"\x03")
    assert terminal.end() == -signal.SIGINT
    assert b"interrupted once" in terminal.shown
    assert b"autobatch: " not in terminal.shown
    assert starts(path) == 1


def test_a_script_that_takes_ctrl_c_for_itself_ends_as_it_likes(tmp_path):
    path = script(
        tmp_path,
        """
        got = []
        signal.signal(signal.SIGINT, lambda *_: got.append(1))
        print("ready", flush=True)
        while not got: time.sleep(0.01)
        sys.exit(5)
        """,
    )
    terminal = Terminal(path)
    terminal.until(b"ready")
    terminal.type(b"\x03")
    assert terminal.end() == 5


def test_ctrl_z_stops_both_and_they_go_on(tmp_path):
    path = script(tmp_path, "print('ready', flush=True)\ntime.sleep(1)\nprint('went on', flush=True)")
    terminal = Terminal(path)
    terminal.until(b"ready")
    # A session without a shell is an orphan, whose job Ctrl-Z does not stop: this is what it would send.
    os.killpg(terminal.pid, signal.SIGSTOP)
    stopped, status = os.waitpid(terminal.pid, os.WUNTRACED)
    assert (stopped, os.WIFSTOPPED(status)) == (terminal.pid, True)
    os.killpg(terminal.pid, signal.SIGCONT)
    assert terminal.end() == 0
    assert b"went on" in terminal.shown


def test_the_modes_of_the_terminal_are_put_back_and_our_line_stands_on_a_line_of_its_own(tmp_path):
    path = script(
        tmp_path,
        """
        import termios, tty
        if start == 1:
            tty.setraw(0)
            note(poison="GPU is lost")
            print("7/20 [====", end="", flush=True)
            sys.exit(1)
        print("echoes:", bool(termios.tcgetattr(0)[3] & termios.ECHO))
        """,
    )
    terminal = Terminal(path)
    assert terminal.end() == 0
    assert b"echoes: True" in terminal.shown
    assert b"[====\r\nautobatch: device lost: " in terminal.shown


def test_a_closed_terminal_ends_both(tmp_path):
    path = script(tmp_path, "print('ready', os.getpid(), flush=True)\ntime.sleep(60)")
    terminal = Terminal(path)
    terminal.until(b"\n")
    child = int(terminal.shown.split()[1])
    os.close(terminal.ours)
    assert os.waitstatus_to_exitcode(os.waitpid(terminal.pid, 0)[1]) == -signal.SIGHUP
    assert not os.path.exists(f"/proc/{child}")
