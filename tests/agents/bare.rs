//! Codex without Fermata: tests the model server, and that the CLI still behaves as Fermata's profile expects. When a
//! new version of the CLI breaks the tests, start here.

use std::process::{Child, Command, Stdio};

use fermata_tests::waiting::{SOON, wait_until};
use fermata_tests::{Workspace, process};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::codex::Codex;
use crate::model_server::{ModelServer, outputs};
use crate::pause_and_resume::{all_steps, six_steps};

fn start(codex: &Codex, workspace: &Workspace, args: &[&str]) -> Child {
    let mut command = Command::new(codex.program());
    command.args(args).env("CODEX_HOME", codex.home()).current_dir(workspace.path());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("start codex")
}

#[test]
#[ignore = "needs the Codex CLI: make test-agents"]
fn a_session_that_was_killed_goes_on_in_its_own_file() {
    let server = ModelServer::start(six_steps);
    server.delay_answer(3);
    let codex = Codex::with_model(&server);
    let temp = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("create a workspace");
    let workspace = Workspace::at(temp.path().join("ws"));
    workspace.git_init();

    let mut first = start(&codex, &workspace, &["exec", "--json", "Do the six steps."]);
    server.wait_for_request(3);
    wait_until(SOON, "the session file to hold all outputs", || codex.session().outputs() == 3);
    let session = codex.session();
    // The program on the path is a wrapper; the agent itself is its child.
    let tree = process::tree(i32::try_from(first.id()).expect("a process id fits into 31 bits"));
    assert!(tree.len() >= 2, "a wrapper and the agent: {tree:?}");
    for pid in tree.iter().rev() {
        kill(Pid::from_raw(*pid), Signal::SIGKILL).expect("kill codex");
    }
    first.wait().expect("wait for codex");
    let text = session.text();
    server.release_answer(3);

    let asked = server.requests().len();
    let mut second = start(&codex, &workspace, &["exec", "--json", "resume", &session.id(), "Go on."]);
    assert!(second.wait().expect("wait for codex").success());
    assert_eq!(workspace.read("steps.txt"), all_steps());
    assert_eq!(codex.session().path(), session.path());
    assert!(codex.session().text().starts_with(&text));
    assert_eq!(outputs(&server.requests()[asked]).len(), 3);
}
