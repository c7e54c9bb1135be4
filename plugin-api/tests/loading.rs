//! Calls of two plugins through the ABI: one in C, compiled by the test, and one in Rust.

use fermata_plugin_api::abi::{FermataPluginV1, PluginEntry, SYMBOL};
use fermata_plugin_api::host::{HostServices, PluginTable};
use fermata_plugin_api::{
    Artifact, CallError, Checkpointer, Description, Host, LogLevel, Plugin, PluginKind, SaveRequest, glue,
};
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

#[derive(Default)]
struct Recorder {
    lines: Mutex<Vec<(LogLevel, String)>>,
    cancelled: AtomicBool,
}

impl HostServices for Recorder {
    fn log(&self, level: LogLevel, message: &str) {
        self.lines.lock().unwrap().push((level, message.to_owned()));
    }
    fn cancelled(&self) -> bool {
        self.cancelled.load(Ordering::SeqCst)
    }
}

fn c_plugin(flags: &[&str]) -> Result<PluginTable, CallError> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let dir = tempfile::tempdir().expect("a temporary directory");
    let object = dir.path().join("libecho.so");
    let compiled = Command::new("cc")
        .args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"])
        .args(flags)
        .arg("-I")
        .arg(root.join("include"))
        .arg("-o")
        .arg(&object)
        .arg(root.join("tests/c/echo.c"))
        .output()
        .expect("cc is installed");
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    // SAFETY: the plugin was compiled just now; its initialisers do nothing.
    let library = unsafe { libloading::Library::new(&object) }.expect("the plugin loads");
    // SAFETY: the symbol has the type that the ABI gives it, and the library is never closed.
    unsafe {
        let table = library.get::<PluginEntry>(SYMBOL).expect("the symbol is there")();
        std::mem::forget(library);
        PluginTable::from_raw(table)
    }
}

#[test]
fn a_plugin_written_in_c_is_described_created_called_and_cancelled() {
    let table = c_plugin(&[]).expect("a complete table");
    assert_eq!(table.describe().unwrap(), Description::new("echo", "1.2.3", [PluginKind::Notify]));

    let recorder = Arc::new(Recorder::default());
    let refused = table.create(&json!({"a": 1}), recorder.clone()).err().expect("settings are refused");
    assert_eq!(refused.code, "bad_settings");

    let echo = table.create(&json!({}), recorder.clone()).unwrap();
    assert_eq!(echo.call("notify", b"{\"event\":1}").unwrap(), b"{\"event\":1}");
    assert_eq!(echo.call("other", b"{}").unwrap_err().code, "unsupported");
    assert_eq!(echo.call("strange", b"{}").unwrap_err().code, "bad_status");
    assert_eq!(echo.call("null", b"{}").unwrap_err().code, "bad_reply");
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| echo.call("wait", b"{}"));
        recorder.cancelled.store(true, Ordering::SeqCst);
        echo.cancel();
        assert_eq!(waiting.join().unwrap().unwrap_err().code, "cancelled");
    });
    let lines = recorder.lines.lock().unwrap();
    assert_eq!(lines[0], (LogLevel::Warn, "notify".to_owned()));
}

#[test]
fn an_incomplete_table_is_refused_with_the_missing_name() {
    let failure = c_plugin(&["-DWITHOUT_FREE"]).err().expect("a refusal");
    assert_eq!(failure.code, "bad_table");
    assert!(failure.message.contains("`free`"), "{}", failure.message);
}

struct Saver;

impl Plugin for Saver {
    fn describe() -> Description {
        Description::new("saver", "0.1.0", [PluginKind::Checkpoint])
    }
    fn create(settings: Value, _host: Host) -> Result<Self, CallError> {
        match settings.get("panic") {
            Some(_) => panic!("asked for"),
            None => Ok(Saver),
        }
    }
    fn checkpointer(&self) -> Option<&dyn Checkpointer> {
        Some(self)
    }
}

impl Checkpointer for Saver {
    fn save(&self, request: &SaveRequest) -> Result<Vec<Artifact>, CallError> {
        assert!(request.frozen, "only frozen projects are saved");
        Ok(vec![Artifact { path: "state.bin".into(), media_type: None, description: Some(request.project.clone()) }])
    }
}

fn saver() -> PluginTable {
    let table = Box::leak(Box::new(glue::table::<Saver>()));
    // SAFETY: the table is leaked and was made by the glue.
    unsafe { PluginTable::from_raw(table) }.expect("a complete table")
}

fn save_request(frozen: bool) -> Vec<u8> {
    json!({"project": "web", "checkpoint": "3", "operation": "op", "workspace": "/w",
           "directory": "/d", "agents": [{"name": "a", "pid": 7}], "frozen": frozen, "new": 1})
    .to_string()
    .into_bytes()
}

#[test]
fn a_rust_plugin_answers_through_the_same_table() {
    let instance = saver().create(&json!({}), Arc::new(Recorder::default())).unwrap();
    let reply = instance.call("checkpoint.save", &save_request(true)).unwrap();
    let reply: Value = serde_json::from_slice(&reply).unwrap();
    assert_eq!(reply["artifacts"][0]["path"], "state.bin");
    assert_eq!(reply["artifacts"][0]["description"], "web");
    for unsupported in ["checkpoint.restore", "notify"] {
        let code = instance.call(unsupported, &save_request(true)).unwrap_err().code;
        assert!(code == "unsupported", "{unsupported}: {code}");
    }
    assert_eq!(instance.call("checkpoint.save", b"{").unwrap_err().code, "bad_request");
}

#[test]
fn no_panic_leaves_a_rust_plugin() {
    let table = saver();
    let recorder = Arc::new(Recorder::default());
    let failure = table.create(&json!({"panic": true}), recorder.clone()).err().expect("a failure");
    assert_eq!(failure.code, "panic");
    assert!(failure.message.contains("asked for"));
    let instance = table.create(&json!({}), recorder).unwrap();
    let failure = instance.call("checkpoint.save", &save_request(false)).unwrap_err();
    assert_eq!(failure.code, "panic");
}

#[test]
fn a_short_or_absent_table_is_refused() {
    // SAFETY: null is allowed.
    let none = unsafe { PluginTable::from_raw(std::ptr::null()) };
    assert_eq!(none.err().map(|f| f.code).as_deref(), Some("bad_table"));
    let mut short: FermataPluginV1 = glue::table::<Saver>();
    short.size = 16;
    // SAFETY: the table lives until the end of the test, and nothing is called.
    let short = unsafe { PluginTable::from_raw(&short) };
    assert!(short.err().is_some_and(|f| f.message.contains("16 bytes")));
}
