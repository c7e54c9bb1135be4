//! A sandbox: a daemon in directories of its own, which are removed with every process that the daemon started.
//!
//! ```text
//! <temp>/fmXXXXXX/            short, since socket paths have at most 108 bytes
//!   r/                        runtime directory: control socket, shims' sockets
//!   state/  home/  plugins/   state directory, $HOME, plugin directory
//!   fermata.toml  fermatad.log
//!   ws/<name>/                workspaces
//! ```
//! The daemon runs in a cgroup of its own, so that all processes that it starts are found at the end. A process that
//! is left after all agents were killed and the daemon was stopped fails the test.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use fermata_protocol::Target;
use fermata_protocol::agent::{AgentKill, AgentList, AgentView};
use fermata_protocol::client::{Client, ClientError};
use fermata_protocol::daemon::Hello;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::cgroup::Group;
use crate::disk::{Disk, Medium};
use crate::waiting::{SOON, poll_for, wait_until};
use crate::workspace::Workspace;
use crate::{passages, process};

/// A daemon or a command without any output for this long counts as hung.
const HANGING: Duration = Duration::from_secs(120);

/// The settings of a sandbox.
#[derive(Debug, Default)]
pub struct SandboxBuilder {
    config: String,
    env: Vec<(String, String)>,
    machine: bool,
    disk: Medium,
}

impl SandboxBuilder {
    /// Sets the content of `fermata.toml`.
    pub fn config(mut self, toml: &str) -> Self {
        self.config = toml.into();
        self
    }

    /// Sets an environment variable of the daemon.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// Runs the daemon as if on a machine of its own: in a process id namespace, all of which [`Sandbox::power_off`]
    /// ends, and with a different boot id after each start.
    pub fn machine(mut self) -> Self {
        self.machine = true;
        self
    }

    /// Puts the state directory on a tmpfs of this size, for instance `24m`, which can fill up.
    pub fn small_disk(mut self, size: &str) -> Self {
        self.disk = Medium::Small(size.into());
        self
    }

    /// Puts the state directory on a file system for which [`Disk::lose_power`] can simulate a power failure.
    pub fn disk_of_its_own(mut self) -> Self {
        self.disk = Medium::File;
        self
    }

    /// Creates the directories without starting the daemon.
    ///
    /// # Panics
    /// When the directories cannot be created, like all functions here: the test cannot continue.
    pub fn build(self) -> Sandbox {
        let dir = tempfile::Builder::new().prefix("fm").tempdir_in(short_temp()).expect("create a temporary directory");
        let path = dir.path().canonicalize().expect("the temporary directory was just made");
        for name in ["r", "state", "home", "plugins", "ws"] {
            fs::create_dir(path.join(name)).expect("create a directory of the sandbox");
        }
        let socket = path.join("r/fermata.sock");
        assert!(socket.as_os_str().len() < 60, "{} is too long for the sockets of shims", socket.display());
        fs::write(path.join("fermata.toml"), &self.config).expect("write fermata.toml");
        let disk = self.disk.mount(&path.join("state"));
        let name = path.file_name().and_then(OsStr::to_str).expect("a temporary name is ASCII");
        let group = Group::create(&format!("fermata-test-{name}"));
        Sandbox {
            path,
            disk,
            _dir: dir,
            socket,
            env: self.env,
            machine: self.machine,
            boots: AtomicU32::new(0),
            group,
            daemon: None,
        }
    }

    /// Creates the sandbox and starts the daemon.
    pub fn start(self) -> Sandbox {
        let mut sandbox = self.build();
        sandbox.start_daemon();
        sandbox
    }
}

/// A running daemon with directories of its own.
#[derive(Debug)]
pub struct Sandbox {
    path: PathBuf,
    // Declared before the directory that it is mounted in, so that it is dropped first.
    disk: Option<Disk>,
    _dir: tempfile::TempDir,
    socket: PathBuf,
    env: Vec<(String, String)>,
    machine: bool,
    boots: AtomicU32,
    group: Option<Group>,
    daemon: Option<Child>,
}

impl Sandbox {
    /// Starts a daemon with the default configuration.
    pub fn start() -> Self {
        Self::builder().start()
    }

    /// Returns a builder for a sandbox with this configuration.
    pub fn builder() -> SandboxBuilder {
        SandboxBuilder::default()
    }

    /// Returns the sandbox's directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the state directory.
    pub fn state_dir(&self) -> PathBuf {
        self.path.join("state")
    }

    /// Returns the file system of the state directory.
    #[track_caller]
    pub fn disk(&self) -> &Disk {
        self.disk.as_ref().expect("built with a disk")
    }

    /// Returns the plugin directory.
    pub fn plugin_dir(&self) -> PathBuf {
        self.path.join("plugins")
    }

    /// Returns `$HOME` of the daemon and of everything that `ctl` starts.
    pub fn home(&self) -> PathBuf {
        self.path.join("home")
    }

    /// Returns the control socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Creates an empty workspace.
    pub fn workspace(&self, name: &str) -> Workspace {
        Workspace::at(self.path.join("ws").join(name))
    }

    // --- the daemon ---

    /// Starts the daemon and waits until it answers `hello`.
    ///
    /// # Panics
    /// When the daemon ends instead; the text contains its log.
    #[track_caller]
    pub fn start_daemon(&mut self) {
        let mut child = self.spawn_daemon();
        let socket = &self.socket;
        let mut ended = None;
        wait_until(SOON, "the daemon to greet", || {
            ended = child.try_wait().expect("ask for the daemon's exit status");
            ended.is_some() || connect(socket).is_ok()
        });
        if let Some(status) = ended {
            panic!("fermatad ended with {status}:\n{}", self.log());
        }
        self.daemon = Some(child);
    }

    /// Reaps a daemon that has died, starts one that a failpoint ends, and waits for its end.
    ///
    /// # Panics
    /// When the daemon does not end.
    #[track_caller]
    pub fn restart_to_its_death(&mut self) -> ExitStatus {
        self.kill_daemon();
        self.start_to_its_death()
    }

    /// Starts a daemon that a failpoint ends, and waits for its end.
    ///
    /// # Panics
    /// When the daemon does not end.
    #[track_caller]
    pub fn start_to_its_death(&mut self) -> ExitStatus {
        self.daemon = Some(self.spawn_daemon());
        self.wait_for_daemon()
    }

    fn spawn_daemon(&self) -> Child {
        assert!(self.daemon.is_none(), "the daemon of this sandbox runs already");
        let log = File::options().create(true).append(true).open(self.log_path()).expect("open fermatad.log");
        // The shell joins the group before it executes the daemon, so that every child is in the group.
        let mut command = Command::new("/bin/sh");
        match &self.group {
            Some(group) => command.args(["-c", "echo $$ > \"$0\" && exec \"$@\""]).arg(group.procs_file()),
            None => command.args(["-c", "exec \"$@\"", "-"]),
        };
        if self.machine {
            command.args(self.boot());
        }
        command.arg(binary("fermatad")).stdin(Stdio::null());
        command.stdout(log.try_clone().expect("duplicate a descriptor")).stderr(log);
        self.set_env(&mut command);
        command
            .env("FERMATA_FAILPOINT_EVENTS", passages::file_in(&self.path))
            .envs(self.env.iter().map(|(name, value)| (name, value)));
        command.spawn().expect("start /bin/sh")
    }

    /// Returns the words before a command that run it as if on a machine that was just booted: the first process of
    /// the namespace reaps orphans as an init does.
    fn boot(&self) -> Vec<String> {
        let boot = self.boots.fetch_add(1, Ordering::Relaxed) + 1;
        let boot_id = self.path.join("boot_id");
        fs::write(&boot_id, format!("00000000-0000-4000-8000-{boot:012}\n")).expect("write the boot id");
        let script = "mount --bind \"$0\" /proc/sys/kernel/random/boot_id && { \"$@\" & wait $!; }";
        let boot_id = boot_id.to_str().expect("a temporary name is ASCII");
        ["unshare", "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "/bin/sh", "-c", script, boot_id]
            .map(String::from)
            .to_vec()
    }

    /// Ends every process of the daemon's machine at once, like a power failure.
    ///
    /// # Panics
    /// When the sandbox has no machine of its own.
    #[track_caller]
    pub fn power_off(&mut self) {
        assert!(self.machine, "built with machine()");
        self.kill_daemon();
        if let Some(group) = &self.group {
            wait_until(SOON, "every process of the machine to end", || group.processes().is_empty());
        }
    }

    /// Simulates a power failure of the sandbox's machine: all processes end and all unflushed data is lost.
    ///
    /// # Panics
    /// When the sandbox has no machine or no disk of its own.
    #[track_caller]
    pub fn lose_power(&mut self) {
        self.power_off();
        self.disk.as_mut().expect("built with a disk of its own").lose_power();
    }

    /// Returns the daemon's process id.
    ///
    /// # Panics
    /// When the daemon was stopped.
    #[track_caller]
    pub fn daemon_pid(&self) -> i32 {
        let child = self.daemon.as_ref().expect("the daemon of this sandbox runs");
        i32::try_from(child.id()).expect("a process id fits into 31 bits")
    }

    /// Returns the processes of the daemon and its agents; `None` without a cgroup.
    pub fn daemon_group(&self) -> Option<Vec<i32>> {
        self.group.as_ref().map(Group::processes)
    }

    /// Returns the cgroups in which agents are frozen; `None` without a cgroup.
    pub fn agent_groups(&self) -> Option<Vec<PathBuf>> {
        self.group.as_ref().map(Group::below)
    }

    /// Sets the content of `fermata.toml` for daemons that are started later.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn set_config(&self, toml: &str) {
        fs::write(self.path.join("fermata.toml"), toml).expect("write fermata.toml");
    }

    /// Kills the daemon with SIGKILL and waits until it is gone.
    #[track_caller]
    pub fn kill_daemon(&mut self) {
        let mut child = self.daemon.take().expect("the daemon of this sandbox runs");
        child.kill().expect("kill the daemon");
        child.wait().expect("wait for the daemon");
    }

    /// Stops the daemon with SIGTERM and waits until it has ended.
    ///
    /// # Panics
    /// When it does not end.
    #[track_caller]
    pub fn stop_daemon(&mut self) -> ExitStatus {
        self.signal_daemon(Signal::SIGTERM);
        self.wait_for_daemon()
    }

    /// Waits until the daemon has ended.
    ///
    /// # Panics
    /// When it does not end.
    #[track_caller]
    pub fn wait_for_daemon(&mut self) -> ExitStatus {
        let mut child = self.daemon.take().expect("the daemon of this sandbox runs");
        let mut ended = None;
        wait_until(SOON, "the daemon to end", || {
            ended = child.try_wait().expect("ask for the daemon's exit status");
            ended.is_some()
        });
        ended.expect("the wait ended with a status")
    }

    /// Sends the daemon a signal.
    #[track_caller]
    pub fn signal_daemon(&self, signal: Signal) {
        kill(Pid::from_raw(self.daemon_pid()), signal).expect("signal the daemon");
    }

    /// Kills the daemon with SIGKILL and starts it again.
    #[track_caller]
    pub fn crash_and_restart(&mut self) {
        self.kill_daemon();
        self.start_daemon();
    }

    /// Sets an environment variable for daemons that are started later.
    pub fn give_env(&mut self, name: &str, value: &str) {
        self.env.push((name.into(), value.into()));
    }

    /// Removes an environment variable from the daemons that are started later.
    pub fn forget_env(&mut self, name: &str) {
        self.env.retain(|(known, _)| known != name);
    }

    /// Returns the log of the daemon.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    fn log_path(&self) -> PathBuf {
        self.path.join("fermatad.log")
    }

    // --- clients ---

    /// Opens a connection to the daemon.
    #[track_caller]
    pub fn rpc(&self) -> Client {
        connect(&self.socket).expect("connect to the daemon")
    }

    /// Prepares a `fermatactl` for this sandbox that does not start a daemon.
    pub fn ctl_command<S: AsRef<OsStr>>(&self, args: &[S]) -> Command {
        let mut command = Command::new(binary("fermatactl"));
        command.arg("--no-autostart").args(args).stdin(Stdio::null()).current_dir(&self.path);
        self.set_env(&mut command);
        command
    }

    /// Runs `fermatactl` and returns its output, whatever its exit status.
    #[track_caller]
    pub fn ctl_output<S: AsRef<OsStr>>(&self, args: &[S]) -> Output {
        output_of(self.ctl_command(args))
    }

    /// Runs `fermatactl`, which must succeed, and returns its standard output.
    ///
    /// # Panics
    /// When it fails; the text contains its error output.
    #[track_caller]
    pub fn ctl<S: AsRef<OsStr> + std::fmt::Debug>(&self, args: &[S]) -> String {
        successful(args, self.ctl_output(args))
    }

    /// Runs `fermatactl --json` and returns the one object that it printed.
    #[track_caller]
    pub fn ctl_json<S: AsRef<OsStr> + std::fmt::Debug>(&self, args: &[S]) -> Value {
        let rows = self.ctl_rows(args);
        assert_eq!(rows.len(), 1, "fermatactl {args:?} printed {} rows, not one", rows.len());
        rows.into_iter().next().unwrap_or_default()
    }

    /// Runs `fermatactl --json` and returns its rows.
    #[track_caller]
    pub fn ctl_rows<S: AsRef<OsStr> + std::fmt::Debug>(&self, args: &[S]) -> Vec<Value> {
        let mut command = self.ctl_command(&["--json"]);
        command.args(args);
        let text = successful(args, output_of(command));
        let row = |line| serde_json::from_str(line).unwrap_or_else(|e| panic!("fermatactl {args:?}: {e}: {line}"));
        text.lines().map(row).collect()
    }

    /// Returns all agents, sorted by project and name.
    #[track_caller]
    pub fn agents(&self) -> Vec<AgentView> {
        list_agents(&mut self.rpc()).expect("list the agents")
    }

    /// Points a command to the sandbox's directories and removes settings of the machine from its environment.
    fn set_env(&self, command: &mut Command) {
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if text.starts_with("FERMATA_") || text.starts_with("XDG_") || text == "NOTIFY_SOCKET" {
                command.env_remove(name);
            }
        }
        command
            .env("FERMATA_STATE_DIR", self.state_dir())
            .env("FERMATA_RUNTIME_DIR", self.path.join("r"))
            .env("FERMATA_CONFIG", self.path.join("fermata.toml"))
            .env("FERMATA_PLUGIN_DIR", self.plugin_dir())
            .env("HOME", self.home())
            .env("NO_COLOR", "1");
    }

    // --- the end ---

    /// Kills every agent through the daemon and stops the daemon; returns the pids of the agents.
    fn end_politely(&mut self) -> Result<Vec<i32>, String> {
        let mut client = connect(&self.socket).map_err(|e| e.to_string())?;
        let agents = list_agents(&mut client).map_err(|e| format!("list the agents: {e}"))?;
        // This also cancels a restart that is still due.
        for agent in agents.iter().filter(|agent| !agent.status.is_terminal()) {
            let target = Target { project: agent.project.clone(), agent: Some(agent.name.clone()) };
            let killed = client.call(&AgentKill { target, signal: None });
            // An agent that has ended by itself in the meantime needs no kill.
            if let (Err(error), Some(pid)) = (killed, agent.pid)
                && !self.machine
                && process::is_alive(pid)
            {
                return Err(format!("kill {}/{}: {error}", agent.project, agent.name));
            }
        }
        let pids = agents.iter().filter_map(|agent| agent.pid).collect();
        let mut child = self.daemon.take().ok_or("the daemon is gone")?;
        // In a namespace the daemon is a descendant of the child.
        let own = i32::try_from(child.id()).unwrap_or(0);
        let program = binary("fermatad").display().to_string();
        let in_machine =
            || self.group.as_ref()?.processes().into_iter().find(|pid| process::command_line(*pid) == program);
        let pid = if self.machine { in_machine().ok_or("the daemon is gone")? } else { own };
        kill(Pid::from_raw(pid), Signal::SIGTERM).map_err(|e| e.to_string())?;
        match poll_for(SOON, || child.try_wait().transpose()) {
            Some(Ok(_)) => Ok(pids),
            Some(Err(error)) => Err(format!("wait for the daemon: {error}")),
            None => {
                self.daemon = Some(child);
                Err("the daemon did not end after SIGTERM".into())
            }
        }
    }

    /// Ends all processes; returns a description of each fault.
    fn end(&mut self) -> Vec<String> {
        let mut faults = Vec::new();
        let mut known = Vec::new();
        let was_up = self.daemon.is_some();
        if was_up {
            match self.end_politely() {
                Ok(pids) => known = pids,
                Err(fault) => faults.push(fault),
            }
        }
        if let Some(mut child) = self.daemon.take() {
            // The process may have ended already; there is nothing more to check.
            if child.kill().is_ok() && child.wait().is_err() {
                faults.push("the daemon could not be reaped".into());
            }
        }
        let left = || match &self.group {
            Some(group) => group.processes(),
            None => known.iter().copied().filter(|&pid| process::is_alive(pid)).collect(),
        };
        // A test that kills the daemon leaves its agents running, as intended. Otherwise the shims get the time to
        // record the end of their agents.
        if was_up && faults.is_empty() && poll_for(SOON, || left().is_empty().then_some(())).is_none() {
            faults.extend(left().iter().map(|&pid| format!("left over: {pid} {}", process::command_line(pid))));
        }
        if let Some(group) = self.group.take() {
            faults.extend(group.kill().and_then(|()| group.remove()).err());
        }
        faults
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        let log = if std::thread::panicking() { self.log() } else { String::new() };
        let faults = self.end();
        if std::thread::panicking() {
            eprintln!("--- fermatad.log ---\n{log}--- end of fermatad.log ---");
            for fault in faults {
                eprintln!("sandbox: {fault}");
            }
        } else {
            assert!(faults.is_empty(), "the sandbox did not end cleanly: {faults:#?}\n{}", self.log());
        }
    }
}

fn list_agents(client: &mut Client) -> Result<Vec<AgentView>, ClientError> {
    let mut params = AgentList::default();
    let mut agents = Vec::new();
    loop {
        let page = client.call(&params)?;
        agents.extend(page.agents);
        params.after = page.next;
        if params.after.is_none() {
            return Ok(agents);
        }
    }
}

/// Returns a binary of this build, which is in the directory above that of the test binaries.
///
/// # Panics
/// When it was not built: `make test` builds all binaries first.
pub fn binary(name: &str) -> PathBuf {
    let path = target_dir().join(name);
    assert!(path.exists(), "{} does not exist: run the tests by `make test`", path.display());
    path
}

/// Returns the directory of this build's binaries and plugins, for instance `target/debug`.
pub fn target_dir() -> PathBuf {
    let test = std::env::current_exe().expect("a test knows its own path");
    test.parent().and_then(Path::parent).expect("tests lie in target/debug/deps").to_owned()
}

/// Returns the directory for temporary files, or `/tmp` when its path is too long for sockets.
fn short_temp() -> PathBuf {
    let temp = std::env::temp_dir();
    if temp.as_os_str().len() > 24 { "/tmp".into() } else { temp }
}

/// Connects and sends `hello`. With the read timeout, a daemon that does not answer fails the test instead of blocking
/// it.
fn connect(socket: &Path) -> Result<Client, ClientError> {
    let mut client = Client::connect_silently(socket)?;
    client.set_read_timeout(Some(HANGING)).map_err(ClientError::Broken)?;
    let version = fermata_protocol::PROTOCOL_VERSION;
    client.call(&Hello { min: version, max: version, client: "fermata-tests".into(), token: None })?;
    Ok(client)
}

/// Runs a command to its end; a command that hangs is killed and fails the test.
///
/// # Panics
/// When the command cannot be started or does not end.
#[track_caller]
pub fn output_of(mut command: Command) -> Output {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let child = child.unwrap_or_else(|e| panic!("start {command:?}: {e}"));
    let pid = Pid::from_raw(i32::try_from(child.id()).expect("a process id fits into 31 bits"));
    let (ended, end) = mpsc::channel();
    std::thread::spawn(move || ended.send(child.wait_with_output()));
    match end.recv_timeout(HANGING) {
        Ok(output) => output.unwrap_or_else(|e| panic!("read what {command:?} says: {e}")),
        Err(_) => {
            kill(pid, Signal::SIGKILL).ok();
            panic!("{command:?} did not end within {HANGING:?}");
        }
    }
}

#[track_caller]
fn successful<S: std::fmt::Debug>(args: &[S], output: Output) -> String {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "fermatactl {args:?} ended with {}:\n{said}{text}", output.status);
    text
}
