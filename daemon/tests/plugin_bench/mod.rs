//! The environment of plugin tests: directories that only the test's user can write, compiled plugins, and waiting.

use fermata_daemon::plugins::frame::{FromHost, ToHost, read_frame, write_frame};
use fermata_daemon::plugins::{
    CrashPolicy, HostState, PluginArtifact, PluginConfig, PluginFailure, PluginStatus, Plugins, SaveRequest,
};
use fermata_os::socket_child::spawn_with_fd3;
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// The deadline after which a test counts as hung.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub struct Bench {
    root: tempfile::TempDir,
    pub config: PluginConfig,
}

impl Bench {
    pub fn new() -> Self {
        let root = tempfile::tempdir().expect("a temporary directory");
        for folder in ["plugins", "settings", "state", "artifacts", "build"] {
            fs::create_dir(root.path().join(folder)).expect("a folder");
            let private = fs::Permissions::from_mode(0o755);
            fs::set_permissions(root.path().join(folder), private).expect("its mode");
        }
        let path = |name: &str| root.path().join(name);
        let config = PluginConfig {
            cancel_grace: PATIENCE,
            crashes: CrashPolicy { backoff_base: Duration::from_millis(10), ..CrashPolicy::default() },
            ..PluginConfig::new(
                vec![path("absent"), path("plugins")],
                path("settings"),
                PathBuf::from(env!("CARGO_BIN_EXE_fermata-plugin-host")),
                path("state"),
            )
        };
        Self { root, config }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    pub fn plugin_dir(&self) -> PathBuf {
        self.path("plugins")
    }

    pub fn object(&self, name: &str) -> PathBuf {
        self.plugin_dir().join(format!("lib{name}.so"))
    }

    /// Compiles the C plugin in a mode and moves it into the plugin directory.
    pub fn c_plugin(&self, name: &str, mode: &str, flags: &[&str]) {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let built = self.path("build").join(format!("{name}.so"));
        let output = Command::new("cc")
            .args(["-std=c11", "-Wall", "-Werror", "-Wno-unused", "-fPIC", "-shared"])
            .arg(format!("-DMODE={mode}"))
            .args(flags)
            .arg("-I")
            .arg(root.join("../plugin-api/include"))
            .arg("-o")
            .arg(&built)
            .arg(root.join("tests/plugins/misbehave.c"))
            .output()
            .expect("cc is installed");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        self.install(&built, name);
    }

    /// Renames a built object into the plugin directory, with the mode of an installed file.
    pub fn install(&self, built: &Path, name: &str) {
        fs::set_permissions(built, fs::Permissions::from_mode(0o755)).expect("its mode");
        fs::rename(built, self.object(name)).expect("the plugin is put into its place");
    }

    pub fn settings(&self, name: &str, text: &str) {
        let path = self.path("settings").join(format!("{name}.toml"));
        fs::write(&path, text).expect("the settings are written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("their mode");
    }

    pub async fn start(&self) -> Plugins {
        Plugins::start(self.config.clone()).await.expect("the plugins start")
    }

    pub fn save_request(&self) -> SaveRequest {
        SaveRequest {
            project: "web".into(),
            checkpoint: "3".into(),
            operation: "op-1".into(),
            workspace: self.root.path().to_owned(),
            directory: self.path("artifacts"),
            agents: Vec::new(),
            frozen: true,
            deadline_ms: None,
        }
    }

    pub async fn running(&self, plugins: &Plugins, name: &str) -> PluginStatus {
        self.until(plugins, name, |s| s.state == HostState::Running).await
    }

    /// Waits until a plugin's status meets a condition, however often the plugin is restarted meanwhile.
    pub async fn until(&self, plugins: &Plugins, name: &str, wish: impl Fn(&PluginStatus) -> bool) -> PluginStatus {
        let since = Instant::now();
        loop {
            let status = plugins.get(name).expect("the plugin is there");
            if wish(&status) {
                return status;
            }
            assert!(since.elapsed() < PATIENCE, "still {status:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Waits until a process has ended.
    pub async fn gone(&self, pid: u32) {
        let since = Instant::now();
        while alive(pid) {
            assert!(since.elapsed() < PATIENCE, "process {pid} lives on");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Starts the host program without a daemon.
    pub fn bare_host(&self, name: &str) -> BareHost {
        let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
        ours.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let mut command = Command::new(&self.config.host_binary);
        command.arg("--plugin").arg(self.object(name));
        let child = spawn_with_fd3(&mut command, theirs.into()).expect("the host starts");
        BareHost { child, stream: ours }
    }
}

/// A host whose daemon is the test.
pub struct BareHost {
    child: Child,
    stream: UnixStream,
}

impl BareHost {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn expect_hello(&mut self) {
        let frame: Option<FromHost> = read_frame(&mut self.stream).expect("a frame");
        assert!(matches!(frame, Some(FromHost::Hello { .. })), "{frame:?}");
    }

    /// Reads messages until the plugin logs a line with this prefix; returns the rest of the line.
    pub fn expect_log(&mut self, prefix: &str) -> String {
        loop {
            let frame: Option<FromHost> = read_frame(&mut self.stream).expect("a frame");
            match frame.expect("the host lives") {
                FromHost::Log { message, .. } => {
                    if let Some(rest) = message.strip_prefix(prefix) {
                        return rest.to_owned();
                    }
                }
                other => panic!("{other:?}"),
            }
        }
    }

    pub fn call(&mut self, id: u64, method: &str) {
        let call = ToHost::Call { id, method: method.to_owned(), params: json!({}), deadline_ms: 60_000 };
        write_frame(&mut self.stream, &call).expect("the call is sent");
    }

    /// Closes the socket without ending the process.
    pub fn hang_up(self) -> Child {
        drop(self.stream);
        self.child
    }
}

/// Says whether a process runs; a zombie does not count.
pub fn alive(pid: u32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return false;
    };
    let state = stat.rsplit_once(") ").map(|(_, rest)| rest.as_bytes()[0]);
    !matches!(state, Some(b'Z' | b'X') | None)
}

pub fn event(name: &str) -> Arc<Value> {
    Arc::new(json!({"type": name, "project": "web"}))
}

pub fn code(result: &Result<PluginArtifact, PluginFailure>) -> &str {
    match result {
        Ok(_) => "ok",
        Err(failure) => &failure.code,
    }
}

/// Installs the exec plugin, which is built first if it is missing or older than its sources.
pub fn exec_plugin(bench: &Bench) {
    // The lock keeps a test from copying the plugin while another test builds it.
    static BUILDING: Mutex<()> = Mutex::new(());
    let _guard = BUILDING.lock().unwrap_or_else(PoisonError::into_inner);
    let host = Path::new(env!("CARGO_BIN_EXE_fermata-plugin-host"));
    let profile_dir = host.parent().expect("the host program is in a folder");
    let object = profile_dir.join("libfermata_exec.so");
    let built = fs::metadata(&object).and_then(|metadata| metadata.modified());
    if built.is_ok_and(|built| built > newest_source()) {
        return copy_exec(bench, &object);
    }
    let target = profile_dir.parent().expect("the folder is in a target directory");
    let mut build = Command::new(env!("CARGO"));
    build
        .args(["build", "-p", "fermata-plugin-exec", "--target-dir"])
        .arg(target)
        .current_dir(env!("CARGO_MANIFEST_DIR"));
    if profile_dir.ends_with("release") {
        build.arg("--release");
    }
    let output = build.output().expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    copy_exec(bench, &object);
}

fn copy_exec(bench: &Bench, object: &Path) {
    let copy = bench.path("build").join("exec.so");
    fs::copy(object, &copy).expect("the plugin is built");
    bench.install(&copy, "fermata_exec");
}

/// Returns the last modification time of the sources of the exec plugin.
fn newest_source() -> SystemTime {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    ["plugins/exec/src", "plugin-api/src"]
        .iter()
        .flat_map(|folder| fs::read_dir(root.join(folder)).expect("the sources are there"))
        .map(|entry| {
            let metadata = entry.and_then(|entry| entry.metadata());
            metadata.and_then(|m| m.modified()).expect("a time")
        })
        .max()
        .expect("there are sources")
}
