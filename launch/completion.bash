# Completion of `python -m launch ...` in bash:  source launch/completion.bash
# Hydra completes scripts and programs; this hands it the words behind `-m launch`.
_complete_launch() {
    [[ $COMP_LINE == *"-m launch "* ]] || return
    local line="launch ${COMP_LINE#*-m launch }"
    local choices
    choices=$(COMP_LINE=$line COMP_POINT=${#line} "${COMP_WORDS[0]}" -m launch --shell-completion query=bash 2>/dev/null)
    COMPREPLY=($(compgen -o default -W "$choices" -- "${COMP_WORDS[COMP_CWORD]}"))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _complete_launch python python3 .venv/bin/python
