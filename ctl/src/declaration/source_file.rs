//! Where a workspace's `fermata.toml` is, and whether its word counts: it names commands to run.

use std::fs::{File, OpenOptions};
use std::io::Read as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use crate::errors::{Exit, Failure};

/// The file's name.
pub const FILE_NAME: &str = "fermata.toml";

/// A larger file was not written by a person.
const MAX_BYTES: u64 = 1 << 20;

/// A file that was found and read.
#[derive(Debug, Clone, PartialEq)]
pub struct Source {
    /// Its absolute path.
    pub file: PathBuf,
    /// The workspace: the directory that it is in.
    pub workspace: PathBuf,
    /// What it says.
    pub text: String,
}

/// Why a file is not read.
#[derive(Debug)]
pub struct Refused {
    /// One sentence.
    pub sentence: String,
    /// What to type next.
    pub hint: Option<String>,
    /// Whether there is no such file.
    missing: bool,
}

impl Refused {
    fn new(sentence: String) -> Self {
        Self { sentence, hint: None, missing: false }
    }
}

/// Finds and reads the file: the given one, or the nearest on the way up from `here`.
///
/// # Errors
/// When there is none, or it cannot be trusted or read.
pub fn find(given: Option<&Path>, here: &Path, home: Option<&Path>) -> Result<Source, Failure> {
    let file = match given {
        Some(file) => file.to_owned(),
        None => nearest(here, home).ok_or_else(|| {
            Failure::new(
                Exit::NotFound,
                "file_not_found",
                format!("there is no {FILE_NAME} in {} or above it", here.display()),
            )
            .hint("go to the workspace, or name the file with --file")
        })?,
    };
    let text = read_trusted(&file).map_err(|refused| {
        let exit = if refused.missing { Exit::NotFound } else { Exit::Usage };
        let code = if refused.missing { "file_not_found" } else { "file_refused" };
        let failure = Failure::new(exit, code, refused.sentence);
        match refused.hint {
            Some(hint) => failure.hint(hint),
            None => failure,
        }
    })?;
    let directory = match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let workspace = crate::commands::canonical(directory)?;
    let file = workspace.join(file.file_name().unwrap_or_default());
    Ok(Source { file, workspace, text })
}

/// Looks for the file in a directory and above it; not above `home` where that is on the way.
fn nearest(here: &Path, home: Option<&Path>) -> Option<PathBuf> {
    for directory in here.ancestors() {
        let file = directory.join(FILE_NAME);
        if file.symlink_metadata().is_ok() {
            return Some(file);
        }
        if Some(directory) == home {
            break;
        }
    }
    None
}

/// Reads a text file that nobody but its owner can write, and that belongs to the caller or to root.
///
/// # Errors
/// Says why not.
pub fn read_trusted(path: &Path) -> Result<String, Refused> {
    let shown = path.display();
    let failed = |error: std::io::Error| Refused {
        missing: error.kind() == std::io::ErrorKind::NotFound,
        ..Refused::new(match error.kind() {
            std::io::ErrorKind::NotFound => format!("there is no file {shown}"),
            _ => format!("failed to read {shown}: {error}"),
        })
    };
    // Without waiting: a pipe of that name would be waited for without end.
    let flags = nix::fcntl::OFlag::O_NONBLOCK.bits();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(failed)?;
    check(path, &file)?;
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(Refused::new(format!("{shown} is larger than {} KiB", MAX_BYTES >> 10)));
    }
    String::from_utf8(bytes).map_err(|error| {
        let valid = error.utf8_error().valid_up_to();
        let line = error.as_bytes()[..valid].iter().filter(|byte| **byte == b'\n').count() + 1;
        Refused::new(format!("{shown} is not valid UTF-8; the first wrong byte is in line {line}"))
    })
}

fn check(path: &Path, file: &File) -> Result<(), Refused> {
    let shown = path.display();
    let about = file.metadata().map_err(|e| Refused::new(format!("failed to look at {shown}: {e}")))?;
    if !about.is_file() {
        return Err(Refused::new(format!("{shown} is not a regular file")));
    }
    let me = nix::unistd::geteuid().as_raw();
    if about.uid() != me && about.uid() != 0 {
        return Err(Refused {
            hint: Some(format!("read it, then take it over: chown {me} {shown}")),
            ..Refused::new(format!(
                "{shown} belongs to another user (uid {}), and what it says would run as you",
                about.uid()
            ))
        });
    }
    if about.mode() & 0o022 != 0 {
        return Err(Refused {
            hint: Some(format!("chmod go-w {shown}")),
            ..Refused::new(format!(
                "{shown} can be written by others than its owner (mode {:04o}), and what it says would run as you",
                about.mode() & 0o7777
            ))
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    fn write(path: &Path, mode: u32) {
        fs::write(path, "# nothing\n").expect("write a file");
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
    }

    fn said(failure: Failure) -> String {
        match failure {
            Failure::Said(report) => format!("{} {}", report.exit.number(), report.message),
            Failure::ReaderGone => panic!("nobody reads"),
        }
    }

    #[test]
    fn the_nearest_file_on_the_way_up_is_found_but_none_above_home() {
        let dir = tempfile::tempdir().expect("a directory");
        let root = dir.path().canonicalize().expect("it is there");
        let deep = root.join("home/ws/deep/er");
        fs::create_dir_all(&deep).expect("directories");
        let home = root.join("home");
        write(&root.join(FILE_NAME), 0o644);
        assert!(said(find(None, &deep, Some(&home)).expect_err("only above home")).starts_with("3 there is no"));
        assert_eq!(find(None, &deep, None).expect("found").workspace, root);
        write(&home.join("ws").join(FILE_NAME), 0o600);
        let found = find(None, &deep, Some(&home)).expect("found");
        assert_eq!((found.file, found.workspace), (home.join("ws").join(FILE_NAME), home.join("ws")));
    }

    #[test]
    fn a_file_that_others_can_write_is_refused_and_so_is_what_is_no_file() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join(FILE_NAME);
        for mode in [0o664, 0o646, 0o666] {
            write(&file, mode);
            let said = said(find(Some(&file), dir.path(), None).expect_err("others can write it"));
            assert!(said.contains("written by others") && said.contains(&format!("{mode:04o}")), "{said}");
        }
        write(&file, 0o644);
        assert!(find(Some(&file), dir.path(), None).is_ok());
        fs::remove_file(&file).expect("remove it");
        assert!(said(find(Some(&file), dir.path(), None).expect_err("gone")).starts_with("3 there is no file"));
        nix::unistd::mkfifo(&file, nix::sys::stat::Mode::from_bits_truncate(0o600)).expect("a pipe");
        assert!(said(find(Some(&file), dir.path(), None).expect_err("a pipe")).contains("not a regular file"));
        fs::remove_file(&file).expect("remove it");
        fs::create_dir(&file).expect("a directory");
        assert!(said(find(Some(&file), dir.path(), None).expect_err("a directory")).contains("not a regular file"));
    }

    #[test]
    fn a_file_that_is_no_text_or_too_large_is_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join(FILE_NAME);
        fs::write(&file, b"a = 1\nb = \"\xff\"\n").expect("write");
        assert!(said(find(Some(&file), dir.path(), None).expect_err("not UTF-8")).contains("line 2"));
        fs::write(&file, vec![b'#'; (MAX_BYTES + 1) as usize]).expect("write");
        assert!(said(find(Some(&file), dir.path(), None).expect_err("large")).contains("larger than 1024 KiB"));
        if nix::unistd::geteuid().is_root() {
            write(&file, 0o644);
            std::os::unix::fs::chown(&file, Some(65_534), None).expect("chown");
            assert!(said(find(Some(&file), dir.path(), None).expect_err("another's")).contains("another user"));
        }
    }
}
