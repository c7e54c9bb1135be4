//! Valid files, and files with every kind of error.

use std::fs;
use std::path::Path;

use fermata_protocol::supervision::{DependencyState, ReadyWhen, RestartPolicy};

use super::environment::Environment;
use super::*;

/// A workspace with a few files in it.
fn workspace() -> tempfile::TempDir {
    let dir = tempfile::Builder::new().prefix("shop.").tempdir().expect("a directory");
    for name in ["db", "deep/er"] {
        fs::create_dir_all(dir.path().join(name)).expect("a directory");
    }
    fs::write(dir.path().join(".env"), "TOKEN=abc\n").expect("a file");
    dir
}

fn valid(text: &str) -> Declaration {
    let dir = workspace();
    let root = dir.path().canonicalize().expect("it is there");
    let source = SourceFile { file: root.join("fermata.toml"), workspace: root, text: text.to_owned() };
    match read(&source) {
        Ok(declaration) => declaration,
        Err(CommandError::Reported(report)) => panic!("{}", report.message),
        Err(CommandError::OutputClosed) => panic!("not reported"),
    }
}

/// Returns the error message for a file, with its directory replaced by `WS`.
fn error_of(text: &str) -> String {
    let dir = workspace();
    let root = dir.path().canonicalize().expect("it is there");
    let source = SourceFile { file: root.join("fermata.toml"), workspace: root.clone(), text: text.to_owned() };
    match read(&source) {
        Err(CommandError::Reported(report)) => {
            assert_eq!(report.exit.number(), 2);
            let above = format!("to {}", root.parent().expect("it has one").display());
            report.message.replace(&*root.to_string_lossy(), "WS").replace(&above, "to ABOVE")
        }
        other => panic!("valid: {other:?}\n{text}"),
    }
}

fn agent<'a>(declaration: &'a Declaration, name: &str) -> &'a DeclaredAgent {
    &declaration.agents[&AgentName::new(name).expect("a name")]
}

#[test]
fn the_example_of_the_reference_is_valid() {
    let page = include_str!("../../../docs/fermata-toml.md");
    let example = page.split("```toml\n").nth(1).and_then(|rest| rest.split("```").next()).expect("an example");
    let shop = valid(example);
    assert_eq!(shop.project.as_str(), "shop");
    let config = shop.config.as_ref().expect("it has settings");
    assert_eq!((config.max_file_bytes, config.exclude.len(), config.token_limit), (64 << 20, 2, 180_000));
    assert_eq!(shop.agents.len(), 4);
    let db = agent(&shop, "db");
    assert_eq!(db.argv, ["postgres", "-D", "data"]);
    assert_eq!(db.cwd, shop.workspace.join("db"));
    assert_eq!((db.stop_grace_ms, db.supervision.resources.memory_max_bytes), (Some(30_000), Some(2 << 30)));
    assert_eq!(db.supervision.ready.as_ref().and_then(|ready| ready.timeout_ms), Some(120_000));
    assert_eq!(agent(&shop, "migrate").env.set["TOKEN"], "abc");
    let coder = agent(&shop, "coder");
    assert_eq!(coder.argv, ["codex", "exec", "work through TODO.md"]);
    assert_eq!(coder.supervision.restart.policy, RestartPolicy::OnFailure);
    assert_eq!((coder.supervision.restart.limit, coder.supervision.restart.max_delay_ms), (5, 600_000));
    let waits: Vec<_> = coder.supervision.depends_on.iter().map(|d| (d.agent.as_str(), d.until)).collect();
    assert_eq!(waits, [("db", DependencyState::Ready), ("migrate", DependencyState::Completed)]);
    assert_eq!(coder.supervision.resources.cpu_max_percent, Some(150));
    let reviewer = agent(&shop, "reviewer");
    assert_eq!(reviewer.supervision.terminal.map(|size| (size.rows, size.cols)), Some((40, 120)));
    let names = |layer: &Vec<AgentName>| layer.iter().map(|name| name.to_string()).collect::<Vec<_>>().join(" ");
    assert_eq!(order::layers(&shop.agents).iter().map(names).collect::<Vec<_>>(), ["db reviewer", "migrate", "coder"]);
}

#[test]
fn the_reference_names_every_key() {
    let page = include_str!("../../../docs/fermata-toml.md");
    let message = error_of("[agents.a]\ncommand = \"x\"\nzzzzzzzzzz = 1\nrestart = { qqqqqqqqqq = 1 }\n");
    let known = message.lines().filter_map(|line| line.trim().strip_prefix("= known keys: "));
    let keys: Vec<String> = known.flat_map(|line| line.split(", ").map(str::to_owned)).collect();
    assert!(keys.len() > 20, "{message}");
    for key in keys {
        assert!(page.contains(&format!("| `{key}` |")), "the reference says nothing of '{key}'");
    }
}

#[test]
fn missing_keys_have_their_defaults() {
    let plain = valid("[agents.a]\ncommand = \"true\"\n");
    let directory = plain.workspace.file_name().expect("it has one").to_string_lossy().into_owned();
    assert_eq!(plain.project.as_str(), directory);
    assert_eq!((plain.config.as_ref(), plain.description.as_ref()), (None, None));
    let a = agent(&plain, "a");
    assert!(a.supervision.is_plain());
    assert_eq!((&a.cwd, &a.env), (&plain.workspace, &Environment::default()));
    let empty = valid("");
    assert!(empty.agents.is_empty());
    assert_eq!(valid("project = \"x\"").project.as_str(), "x");
}

#[test]
fn a_project_name_is_derived_from_the_directory() {
    for (directory, name) in [
        ("/a/shop", Some("shop")),
        ("/a/My Shop (2)", Some("My-Shop--2")),
        ("/a/.dotfiles", Some("dotfiles")),
        ("/a/---", None),
        ("/", None),
    ] {
        assert_eq!(name_of(Path::new(directory)).as_ref().map(ProjectName::as_str), name, "{directory}");
    }
}

#[test]
fn every_form_of_a_value_is_read() {
    let text = "[agents.a]\ncommand = ['x', '&&', '']\nready = {command = \"nc -z h 1\"}\ntty = true\nrestart = {}\n\
                depends_on = \"b\"\nstale_after = \"never\"\ncwd = \"deep/../deep/er\"\nmemory_max = \"1.5G\"\n\
                [agents.b]\ncommand = \"x 'a b'\"\ntty = false\nrestart = \"no\"\npre_start = [\"y\"]\n";
    let read = valid(text);
    let a = agent(&read, "a");
    assert_eq!(a.argv, ["x", "&&", ""]);
    assert_eq!(a.cwd, read.workspace.join("deep/er"));
    let ready = a.supervision.ready.as_ref().expect("it says when");
    assert_eq!(ready.when, ReadyWhen::Command(["nc", "-z", "h", "1"].map(str::to_owned).to_vec()));
    assert_eq!(a.supervision.terminal.map(|size| (size.rows, size.cols)), Some((24, 80)));
    assert_eq!(a.supervision.restart.policy, RestartPolicy::OnFailure);
    assert_eq!(a.supervision.stale_after_ms, Some(0));
    assert_eq!(a.supervision.resources.memory_max_bytes, Some(3 << 29));
    let b = agent(&read, "b");
    assert_eq!((b.argv.len(), b.supervision.terminal), (2, None));
    assert_eq!(b.supervision.pre_start.as_ref().map(|hook| hook.argv.len()), Some(1));
}

#[test]
fn the_digest_depends_on_the_meaning_and_not_on_the_formatting() {
    let digest = |text: &str| agent(&valid(&format!("[agents.a]\ncwd = \"/\"\n{text}")), "a").digest();
    let first = digest("command = \"x y\"\ntimeout = \"90s\"\nenv = {A = \"1\"}\n");
    assert_eq!(first, digest("# a comment\nenv = {A = \"2\"}\ntimeout = '1m30s'\ncommand = ['x', \"y\"]\n"));
    assert_eq!(digest("command = \"x\"\n"), digest("command = \"x\"\nrestart = \"no\"\n"));
    for other in [
        "command = \"x\"\ntimeout = \"90s\"\nenv = {A = \"1\"}\n",
        "command = \"x y\"\ntimeout = \"91s\"\nenv = {A = \"1\"}\n",
        "command = \"x y\"\ntimeout = \"90s\"\nenv = {B = \"1\"}\n",
        "command = \"x y\"\ntimeout = \"90s\"\nenv = {A = \"1\"}\npass_env = []\n",
    ] {
        assert_ne!(first, digest(other), "{other}");
    }
    // If the digest changed with a release, every agent would be reported as changed.
    assert_eq!(
        digest("command = \"x\"\nrestart = \"always\"\nready = {reported = true}\n"),
        "8a5b8e5956685f3b950a41a0ba7a7f5bc8bc444d5a273a1f1ba982870c41e7d2"
    );
}

/// `broken.txt` has files and their error messages; `UPDATE_GOLDEN=1` rewrites the messages.
#[test]
fn errors_are_reported_with_line_column_and_key() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/declaration/broken.txt");
    let before = fs::read_to_string(&golden).expect("it is in the repository");
    let mut now = String::new();
    for case in before.split("=== ").skip(1) {
        let (head, _) = case.split_once("---\n").expect("a file and its message");
        let (_, text) = head.split_once('\n').expect("a name and a file");
        let message = error_of(text);
        let message = message.strip_prefix("WS/fermata.toml has ").expect("the name of the file");
        now.push_str(&format!("=== {head}---\n{message}\n\n"));
    }
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&golden, &now).expect("write the golden file");
    } else {
        assert!(now == before, "messages have changed; they are now:\n{now}");
    }
}

#[test]
fn all_errors_of_a_file_are_reported_at_once() {
    let message = error_of(
        "prject = \"x\"\n[agents.a]\ncomand = \"x\"\nstop_grace = 5\n[agents.\"b c\"]\ncommand = \"x\"\n[agents.d]\ncommand = \"\"\n",
    );
    assert!(message.starts_with("WS/fermata.toml has 5 errors; nothing was changed\n\nline 1, column 1:"), "{message}");
    let lines: Vec<&str> = message.lines().filter(|line| line.starts_with("line ")).collect();
    let locations: Vec<&str> = lines.iter().filter_map(|line| line.split(':').next()).collect();
    assert_eq!(
        locations,
        ["line 1, column 1", "line 3, column 1", "line 4, column 14", "line 5, column 9", "line 8, column 11"]
    );
}

#[test]
fn the_json_error_has_the_problems_with_their_locations() {
    let dir = workspace();
    let source = SourceFile {
        file: dir.path().join("fermata.toml"),
        workspace: dir.path().to_owned(),
        text: "[agents.a]\ncommand = \"x\"\nretsart = \"no\"\n".into(),
    };
    let Err(CommandError::Reported(report)) = read(&source) else { panic!("not reported") };
    let details = report.details.expect("for programs");
    let problem = &details["problems"][0];
    assert_eq!((problem["line"].as_u64(), problem["column"].as_u64()), (Some(3), Some(1)));
    assert_eq!(problem["key"], "agents.a.retsart");
    assert_eq!(problem["hint"], "did you mean 'restart'?");
    assert_eq!(report.code, "invalid_file");
}

#[test]
fn a_long_chain_of_agents_is_ordered_and_a_long_cycle_is_found() {
    let mut text = String::new();
    for i in 0..5_000 {
        text.push_str(&format!("[agents.a{i}]\ncommand = \"x\"\ndepends_on = [\"a{}\"]\n", i + 1));
    }
    text.push_str("[agents.a5000]\ncommand = \"x\"\n");
    assert_eq!(order::layers(&valid(&text).agents).len(), 5_001);
    text.push_str("depends_on = [\"a0\"]\n");
    let message = error_of(&text);
    assert!(message.contains("dependency cycle: a0 -> a1 -> a2"), "{}", &message[..200]);
}
